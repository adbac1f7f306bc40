"""Time to simulate radiographs: one thread at two sizes, compared with sampling the same arm on a grid of voxels, and a data set of 400 images.

    python bench/phantom.py
"""
import os, sys, tempfile, time
os.environ.setdefault('OMP_NUM_THREADS', '1')
from pathlib import Path
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import cv2, numpy as np
from results import write_results
from elbowsynth.phantom.anatomy import BONES, pose_arm, sample_arm
from elbowsynth.phantom.geometry import Ellipsoid
from elbowsynth.phantom.injuries import apply_injuries
from elbowsynth.data.classes import PATHOLOGIES, VIEWS
from elbowsynth.phantom.exposure import bone_thickness, sample_projection
from elbowsynth.phantom.phantom import phantom, write_phantom_dataset

def seconds(f):
    start = time.thread_time()
    f()
    return time.thread_time()-start

def contains(body, q):
    "Which points are inside a body"
    if isinstance(body, Ellipsoid):
        p = (q-np.float32(body.center))@np.float32(body.rotation)/np.float32(body.semi_axes)
        return (p*p).sum(-1)<1
    y, a, b, x, z = body.sections
    a, b, x, z = (np.interp(q[..., 1], y, o).astype(np.float32) for o in (a, b, x, z))
    return ((q[..., 0]-x)/a)**2+((q[..., 2]-z)/b)**2<((q[..., 1]>y[0]) & (q[..., 1]<y[-1]))

def voxel_sum(parts, beam, step, reach=60):
    "Millimeters of bone along each ray, by testing points at a distance of `step` mm"
    right, down, ray = np.float32(beam.axes)
    total = np.zeros((beam.v.size, beam.u.size), np.float32)
    for depth in np.arange(-reach, reach, step, dtype=np.float32):
        at = np.float32(beam.origin)+beam.u[..., None]*right+beam.v[..., None]*down+depth*ray
        for p in parts:
            if p.structure not in BONES: continue
            q = (at-np.float32(p.translation))@np.float32(p.rotation)
            within = np.logical_or.reduce([contains(o, q) for o in p.bodies])
            for o in p.holes: within &= ~contains(o, q)
            for point, normal, gap, _ in p.cut_planes: within &= (q-np.float32(point))@np.float32(normal)>gap
            total += within*np.float32(step)
    return total

cv2.setNumThreads(1)
requests = [(v, [p], 'L', age, i) for i, (p, v, age) in enumerate((p, v, age) for p in PATHOLOGIES for v in VIEWS for age in (6, 30))]
phantom('AP', ['normal'])
rows = []
for size, some in ((256, requests), (1024, requests[::3])):
    times = np.array([seconds(lambda: phantom(*a, size=size)) for a in some])*1000
    rows.append({'benchmark': f'an image of {size} x {size}, median of {len(some)}', 'ms': np.median(times).item()})

size, projection = 128, sample_projection('AP', 1, np.random.default_rng(0))
parts, beam = pose_arm(apply_injuries(sample_arm(0), ['olecranon fracture'], 0), projection.flexion), projection.beam(size)
lengths = {}
ours = np.median([seconds(lambda: lengths.update(ours=bone_thickness(parts, beam)[2])) for _ in range(9)])
voxels = seconds(lambda: lengths.update(voxels=voxel_sum(parts, beam, projection.width/size)))
off = np.abs(lengths['ours']-lengths['voxels'])[lengths['ours']>0].mean()
rows += [{'benchmark': f'bones only, {size} x {size}', 'ms': 1000*ours.item()},
         {'benchmark': f'the same on a grid of voxels (mean difference {off:.2f} mm of {lengths["ours"][lengths["ours"]>0].mean():.1f}, voxel size {projection.width/size:.2f} mm)',
          'ms': 1000*voxels, 'relative_time': float(voxels/ours)}]

with tempfile.TemporaryDirectory() as folder:
    start, busy = time.perf_counter(), time.process_time()
    write_phantom_dataset(folder, 200, 256)
    rows.append({'benchmark': 'a data set of 400 images of 256 x 256 with masks, label maps and ground truth, all cores, wall time', 'ms': 1000*(time.perf_counter()-start)})
write_results('phantom', 'Simulated radiographs', 'CPU time of one thread, except for the data set. `python bench/phantom.py`.', rows)

"""How long made-up films take: on one thread, at two sizes; beside sampling the same arm on a grid of voxels, as a plain program would; and a folder of 400.

    python bench/phantom.py
"""
import os, sys, tempfile, time
os.environ.setdefault('OMP_NUM_THREADS', '1')
from pathlib import Path
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import cv2, numpy as np
from results import keep
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

def holds(body, q):
    "Which points lie in a body"
    if isinstance(body, Ellipsoid):
        p = (q-np.float32(body.center))@np.float32(body.turn)/np.float32(body.semi)
        return (p*p).sum(-1)<1
    y, a, b, x, z = body.sections
    a, b, x, z = (np.interp(q[..., 1], y, o).astype(np.float32) for o in (a, b, x, z))
    return ((q[..., 0]-x)/a)**2+((q[..., 2]-z)/b)**2<((q[..., 1]>y[0]) & (q[..., 1]<y[-1]))

def voxel_sum(pieces, beam, step, reach=60):
    "Millimetres of bone along each ray, by asking at points that lie `step` apart whether they are within one"
    right, down, ray = np.float32(beam.axes)
    total = np.zeros((beam.v.size, beam.u.size), np.float32)
    for depth in np.arange(-reach, reach, step, dtype=np.float32):
        at = np.float32(beam.origin)+beam.u[..., None]*right+beam.v[..., None]*down+depth*ray
        for p in pieces:
            if p.part not in BONES: continue
            q = (at-np.float32(p.shift))@np.float32(p.turn)
            within = np.logical_or.reduce([holds(o, q) for o in p.bodies])
            for o in p.carved: within &= ~holds(o, q)
            for point, normal, gap, _ in p.cuts: within &= (q-np.float32(point))@np.float32(normal)>gap
            total += within*np.float32(step)
    return total

cv2.setNumThreads(1)
asked = [(v, [p], 'L', age, i) for i, (p, v, age) in enumerate((p, v, age) for p in PATHOLOGIES for v in VIEWS for age in (6, 30))]
phantom('AP', ['normal'])
rows = []
for size, some in ((256, asked), (1024, asked[::3])):
    times = np.array([seconds(lambda: phantom(*a, size=size)) for a in some])*1000
    rows.append({'what': f'a film of {size} x {size}, median of {len(some)}', 'ms': np.median(times).item()})

size, camera = 128, sample_projection('AP', 1, np.random.default_rng(0))
pieces, beam = pose_arm(apply_injuries(sample_arm(0), ['olecranon fracture'], 0), camera.flexion), camera.beam(size)
lengths = {}
ours = np.median([seconds(lambda: lengths.update(ours=bone_thickness(pieces, beam)[2])) for _ in range(9)])
voxels = seconds(lambda: lengths.update(voxels=voxel_sum(pieces, beam, camera.width/size)))
off = np.abs(lengths['ours']-lengths['voxels'])[lengths['ours']>0].mean()
rows += [{'what': f'bones alone, {size} x {size}', 'ms': 1000*ours.item()},
         {'what': f'the same on a grid of voxels ({off:.2f} mm apart of {lengths["ours"][lengths["ours"]>0].mean():.1f} on the average, a voxel being {camera.width/size:.2f} mm)',
          'ms': 1000*voxels, 'times ours': float(voxels/ours)}]

with tempfile.TemporaryDirectory() as folder:
    start, busy = time.perf_counter(), time.process_time()
    write_phantom_dataset(folder, 200, 256)
    rows.append({'what': 'a folder of 400 films of 256 x 256 with masks, label maps and truth, all cores, by the clock', 'ms': 1000*(time.perf_counter()-start)})
keep('phantom', 'Made-up films', 'Processor time of one thread, but for the folder. `python bench/phantom.py`.', rows)

"Anatomy: closed forms against sampled rays, every injury at every age, growth centers in order, and time by image size"
from dataclasses import replace
import time
import cv2, numpy as np, pytest
from elbowsynth.phantom.anatomy import (
    BONES, OSSIFICATION_CENTERS, pose_arm, posed_landmarks, radiographic_measurements, sample_arm)
from elbowsynth.phantom.geometry import (
    Beam, Ellipsoid, Part, path_length, rotation_matrix, sort_network, Tube, union_length)
from elbowsynth.phantom.injuries import apply_injuries
from elbowsynth.data.classes import PATHOLOGIES

VIEWPOINTS = {'AP': (np.array([[1, 0, 0], [0, -1, 0], [0, 0, 1.]]), 5, (.5, .5)), 'LAT': (np.array([[0, 0, -1], [0, -1, 0], [1., 0, 0]]), 90, (.6, .6))}
INJURED = [p for p in PATHOLOGIES if p!='normal']

def beam(view, size, width=190., rotation=np.eye(3)):
    axes, _, joint = VIEWPOINTS[view]
    at = (np.arange(size, dtype=np.float32)+.5)/size
    u, v = ((at-o)*width for o in joint)
    return Beam(u[None], v[:, None], axes@rotation)

def thickness(arm, view, size=64): # mm of bone, of marrow, of soft tissue
    rays, total = beam(view, size), np.zeros((3, size, size))
    for p in pose_arm(arm, VIEWPOINTS[view][1]):
        window, outer, inner = path_length(p, rays)
        assert np.isfinite(outer).all() and outer.min()>=-1e-2 and inner.min()>=-1e-2, p.structure
        if p.structure in BONES:
            total[0][window] += outer
            total[1][window] += inner
        else: total[2][window] += outer
    return total

def points_on(arm, view): return {k: VIEWPOINTS[view][0][:2]@q for k,q in posed_landmarks(arm, VIEWPOINTS[view][1]).items()}

def contains(body, q): # whether points lie in a body, by its definition
    if isinstance(body, Ellipsoid): return ((((q-body.center)@body.rotation)/body.semi_axes)**2).sum(-1)<=1
    y,a,b,x,z = body.sections
    at = np.interp(q[..., 1], y, np.arange(len(y)))
    a,b,x,z = (np.interp(at, np.arange(len(y)), o) for o in (a, b, x, z))
    return (((q[..., 0]-x)/a)**2+((q[..., 2]-z)/b)**2<=1) & (q[..., 1]>=y[0]) & (q[..., 1]<=y[-1])

def sampled_length(part, rays, step=.05): # path length by sampling points along each ray
    t = np.arange(-80, 80, step)
    right, down, ray = rays.axes
    q = rays.u[..., None, None]*right+rays.v[..., None, None]*down+t[:, None]*ray+rays.origin
    q = (q-part.translation)@part.rotation
    inside = np.any([contains(o, q) for o in part.bodies], 0) if part.bodies else np.zeros(q.shape[:-1], bool)
    for o in part.holes: inside &= ~contains(o, q)
    for point,normal,gap,_ in part.cut_planes: inside &= (q-point)@normal>=gap
    return inside.sum(-1)*step

def random_rotation(rng): return rotation_matrix(0, rng.uniform(0, 360))@rotation_matrix(1, rng.uniform(0, 360))@rotation_matrix(2, rng.uniform(0, 360))

def random_part(rng):
    def ball(): return Ellipsoid(rng.uniform(-12, 12, 3), rng.uniform(3, 15, 3), random_rotation(rng))
    part = Part('humerus', [ball() for _ in range(rng.integers(1, 5))], tuple(ball() for _ in range(rng.integers(0, 3))))
    if rng.random()<.6: part = part.cut(rng.uniform(-5, 5, 3), rng.normal(size=3), rng.uniform(0, 3))[rng.integers(2)]
    return part.moved(random_rotation(rng), rng.uniform(-10, 10, 3), rng.uniform(-5, 5, 3))

@pytest.mark.parametrize('seed', range(12))
def test_path_length_of_ellipsoids_equals_sampled_rays(seed):
    rng = np.random.default_rng(seed)
    part, rays = random_part(rng), beam('AP', 24, 90, random_rotation(rng))
    window, length, _ = path_length(part, rays)
    full = np.zeros((24, 24))
    full[window] = length
    truth = sampled_length(part, rays)
    assert np.abs(full-truth).max()<.35, np.abs(full-truth).max()     # a sample's step at each end of each interval
    assert np.abs(full-truth).mean()<.03

@pytest.mark.parametrize('tilt', [0, 5, 20])
def test_path_length_of_tubes_at_oblique_angles(tilt):
    tube = Tube(np.array([[-40, 12, 9, 0, 0], [-10, 7, 8, 2, -1], [15, 9, 6, 0, 1], [40, 11, 11, -2, 0]]))
    part = Part('radius', [tube, Ellipsoid((0, 0, 4), (9, 14, 7), rotation_matrix(2, 30))]).moved(rotation_matrix(0, tilt)@rotation_matrix(2, tilt/2), (1, -2, 0))
    rays = beam('AP', 40, 100)
    window, length, _ = path_length(part, rays)
    full = np.zeros((40, 40))
    full[window] = length
    truth = sampled_length(part, rays)
    assert abs(full.sum()/truth.sum()-1)<.004
    assert np.abs(full-truth).mean()<(.03 if tilt<10 else .12)

def test_marrow_is_inside_bone_and_strips_do_not_matter():
    arm = sample_arm(1)
    for p in pose_arm(arm, 80):
        window, outer, inner = path_length(p, beam('LAT', 150))
        again = path_length(p, beam('LAT', 150), strip=17)
        assert window==again[0]
        np.testing.assert_allclose(outer, again[1], atol=2e-3)
        if p.structure in BONES: assert (inner<=outer+2e-2).all()

@pytest.mark.parametrize('n', range(1, 17))
def test_sort_network_and_union_length(n):
    rng = np.random.default_rng(n)
    values = rng.integers(0, 9, (n, 200)).astype(np.float32)
    np.testing.assert_array_equal(sort_network(list(values)), np.sort(values, 0))
    t0, t1 = values, values+rng.integers(-2, 5, (n, 200)).astype(np.float32)
    ticks = np.arange(-2, 14)+.5                                      # integers: count the unit intervals that are covered
    covered = [sum(any(a<=k<=b for a,b in zip(t0[:, i], t1[:, i])) for k in ticks) for i in range(200)]
    np.testing.assert_allclose(union_length(list(zip(t0, t1))), covered, atol=1e-4)

@pytest.mark.long('all injuries at all ages, 20 s')
@pytest.mark.parametrize('age', [2, 4, 6, 8, 10, 12, 14.5, 17, 40, 75])
@pytest.mark.parametrize('pathology', INJURED)
def test_every_injury_at_every_age_is_visible_and_reproducible(pathology, age):
    for seed in (1, 2):
        healthy = sample_arm(seed, age)
        injured = apply_injuries(healthy, [pathology], seed)
        changes = {view: np.abs(thickness(injured, view)-thickness(healthy, view)).sum(0) for view in VIEWPOINTS}
        near = {view: np.hypot(beam(view, 64).u, beam(view, 64).v)<60 for view in VIEWPOINTS}
        assert max(changes[view][near[view]].max() for view in VIEWPOINTS)>1.5, (pathology, age, seed)
        assert max((changes[view][near[view]]>.5).sum() for view in VIEWPOINTS)>=4
    np.testing.assert_array_equal(thickness(injured, 'LAT'), thickness(apply_injuries(sample_arm(seed, age), [pathology], seed), 'LAT'))

def test_injuries_of_the_ends_change_only_the_ends():
    for pathology,view in (('medial epicondyle displaced', 'AP'), ('lateral epicondyle displaced', 'AP'), ('radial head fracture', 'AP'), ('olecranon fracture', 'LAT')):
        for seed in range(6):
            for age in (6, 12, 30):
                healthy = sample_arm(seed, age)
                change = np.abs(thickness(apply_injuries(healthy, [pathology], seed), view)-thickness(healthy, view))[0]
                rays = beam(view, 64)
                assert change.max()>.5 and change[np.hypot(rays.u, rays.v)>62].max()<1e-3, (pathology, seed, age)

def test_growth_centers_appear_in_order_grow_and_fuse():
    for sex,delay in (('F', 0), ('M', 1)):
        seen = {}
        for age in np.arange(.25, 20, .25):
            for name in set(OSSIFICATION_CENTERS) & {*(arm := sample_arm(5, age, sex)).upper_arm, *arm.forearm}: seen.setdefault(name, []).append(age)
        assert sorted(seen, key=lambda k: seen[k][0])==list(OSSIFICATION_CENTERS)
        assert {k: v[0] for k,v in seen.items()}=={k: o[1]+delay for k,o in OSSIFICATION_CENTERS.items()}
        assert seen['medial epicondyle'][0]<seen['trochlea'][0]       # I before T
        assert all(14+delay<=v[-1]+.25<=17+delay for v in seen.values())
        volume = [sum(path_length((sample_arm(5, a, sex).upper_arm)['capitellum'], beam('AP', 96))[1].ravel()) for a in (3, 6, 9, 12)]
        assert np.all(np.diff(volume)>0)

def test_growth_plate_width():
    arm = sample_arm(2, 12, 'F')
    rays = replace(beam('AP', 400, 100), origin=np.zeros(3))
    body, center = (arm.upper_arm[k] for k in ('humerus', 'capitellum'))
    full = np.zeros((2, 400, 400))
    for o,p in zip(full, (body, center)):
        window, length, _ = path_length(p, rays)
        o[window] = length
    point, normal, gap, _ = center.cut_planes[-1]
    assert 1<2*gap*arm.scale<2.2
    assert (full.min(0)>0).sum()<(full.max(0)>0).sum()*.1             # the two hardly overlap

@pytest.mark.parametrize('age', [3, 8, 13, 30, 70])
def test_radiographic_measurements_of_healthy_and_injured_arms(age):
    values = {v: [radiographic_measurements(points_on(sample_arm(s, age), v), v) for s in range(25)] for v in VIEWPOINTS}
    assert all(o['radiocapitellar line']=='passes' for v in VIEWPOINTS for o in values[v])
    assert all(o['anterior humeral line']=='middle third' for o in values['LAT'])
    assert all(60<o['Baumann angle']<84 and 3<o['carrying angle']<16 for o in values['AP'])
    assert all(30<o['humerotrochlear angle']<50 for o in values['LAT'])
    def after(p, v='LAT'): return [radiographic_measurements(points_on(apply_injuries(sample_arm(s, age), [p], s), v), v) for s in range(25)]
    for p in ('elbow dislocation anterior', 'elbow dislocation posterior', 'radial head subluxation'):
        assert all(o['radiocapitellar line']=='fails' for o in after(p)), p
    extension = [o['anterior humeral line'] for o in after('supracondylar fracture')]
    assert set(extension)<={'middle third', 'anterior third', 'in front'} and extension.count('middle third')<=10

def test_landmarks_move_with_their_bones():
    for age in (6, 30):
        arm = sample_arm(4, age)
        def moved(p, name): return np.linalg.norm(posed_landmarks(apply_injuries(arm, [p], 4), 90)[name]-posed_landmarks(arm, 90)[name])
        assert moved('olecranon fracture', 'olecranon')>.5 and moved('olecranon fracture', 'coronoid')==0
        assert moved('supracondylar fracture', 'capitellum')>.5 and moved('supracondylar fracture', 'shaft lower')==0
        assert moved('medial epicondyle displaced', 'medial epicondyle')>4 and moved('medial epicondyle displaced', 'trochlea')==0
        assert moved('elbow dislocation posterior', 'radial head')>20 and moved('elbow dislocation posterior', 'capitellum')==0
        assert moved('joint effusion', 'capitellum')==0

def test_all_pairs_of_injuries():
    for i,p in enumerate(INJURED):
        for q in INJURED[i+1:]:
            for age in (5, 12, 30): thickness(apply_injuries(sample_arm(i, age), [p, q], i), 'LAT', 32)

def test_time_grows_less_than_the_number_of_pixels():
    cv2.setNumThreads(1)
    arm = apply_injuries(sample_arm(0), ['supracondylar fracture'], 0)
    def seconds(size):
        rays = beam('LAT', size)
        times = []
        for _ in range(5):
            start = time.thread_time()
            for p in pose_arm(arm, 90):
                if p.structure in BONES: path_length(p, rays)
            times.append(time.thread_time()-start)
        return np.median(times)
    seconds(64)
    assert seconds(1024)<16*seconds(256)

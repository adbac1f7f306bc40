"Anatomy: closed forms against sampled rays, every injury at every age, growth in its order, and the price of a pixel"
from dataclasses import replace
import time
import cv2, numpy as np, pytest
from elbowsynth.phantom.anatomy import (
    BONES, OSSIFICATION_CENTERS, pose_arm, posed_landmarks, radiographic_measurements, sample_arm)
from elbowsynth.phantom.geometry import (
    Beam, Ellipsoid, Part, path_length, rotation_matrix, sort_network, Tube, union_length)
from elbowsynth.phantom.injuries import apply_injuries
from elbowsynth.data.classes import PATHOLOGIES

FILMS = {'AP': (np.array([[1, 0, 0], [0, -1, 0], [0, 0, 1.]]), 5, (.5, .5)), 'LAT': (np.array([[0, 0, -1], [0, -1, 0], [1., 0, 0]]), 90, (.6, .6))}
HURT = [p for p in PATHOLOGIES if p!='normal']

def beam(view, size, width=190., turn=np.eye(3)):
    axes, _, joint = FILMS[view]
    at = (np.arange(size, dtype=np.float32)+.5)/size
    u, v = ((at-o)*width for o in joint)
    return Beam(u[None], v[:, None], axes@turn)

def film(arm, view, size=64): # millimetres of bone, of marrow, and of flesh
    rays, total = beam(view, size), np.zeros((3, size, size))
    for p in pose_arm(arm, FILMS[view][1]):
        place, outer, inner = path_length(p, rays)
        assert np.isfinite(outer).all() and outer.min()>=-1e-2 and inner.min()>=-1e-2, p.part
        if p.part in BONES:
            total[0][place] += outer
            total[1][place] += inner
        else: total[2][place] += outer
    return total

def points_on(arm, view): return {k: FILMS[view][0][:2]@q for k,q in posed_landmarks(arm, FILMS[view][1]).items()}

def holds(body, q): # whether points lie in a body, by the definition of it
    if isinstance(body, Ellipsoid): return ((((q-body.center)@body.turn)/body.semi)**2).sum(-1)<=1
    y,a,b,x,z = body.sections
    at = np.interp(q[..., 1], y, np.arange(len(y)))
    a,b,x,z = (np.interp(at, np.arange(len(y)), o) for o in (a, b, x, z))
    return (((q[..., 0]-x)/a)**2+((q[..., 2]-z)/b)**2<=1) & (q[..., 1]>=y[0]) & (q[..., 1]<=y[-1])

def sampled(piece, rays, step=.05): # length by walking along each ray
    t = np.arange(-80, 80, step)
    right, down, ray = rays.axes
    q = rays.u[..., None, None]*right+rays.v[..., None, None]*down+t[:, None]*ray+rays.origin
    q = (q-piece.shift)@piece.turn
    held = np.any([holds(o, q) for o in piece.bodies], 0) if piece.bodies else np.zeros(q.shape[:-1], bool)
    for o in piece.carved: held &= ~holds(o, q)
    for point,normal,gap,_ in piece.cuts: held &= (q-point)@normal>=gap
    return held.sum(-1)*step

def random_turn(rng): return rotation_matrix(0, rng.uniform(0, 360))@rotation_matrix(1, rng.uniform(0, 360))@rotation_matrix(2, rng.uniform(0, 360))

def random_piece(rng):
    ball = lambda: Ellipsoid(rng.uniform(-12, 12, 3), rng.uniform(3, 15, 3), random_turn(rng))
    piece = Part('humerus', [ball() for _ in range(rng.integers(1, 5))], tuple(ball() for _ in range(rng.integers(0, 3))))
    if rng.random()<.6: piece = piece.cut(rng.uniform(-5, 5, 3), rng.normal(size=3), rng.uniform(0, 3))[rng.integers(2)]
    return piece.moved(random_turn(rng), rng.uniform(-10, 10, 3), rng.uniform(-5, 5, 3))

@pytest.mark.parametrize('seed', range(12))
def test_lengths_of_ellipsoids_cut_carved_and_moved_are_those_of_sampled_rays(seed):
    rng = np.random.default_rng(seed)
    piece, rays = random_piece(rng), beam('AP', 24, 90, random_turn(rng))
    place, length, _ = path_length(piece, rays)
    full = np.zeros((24, 24))
    full[place] = length
    truth = sampled(piece, rays)
    assert np.abs(full-truth).max()<.35, np.abs(full-truth).max()     # a sample's step at each end of each interval
    assert np.abs(full-truth).mean()<.03

@pytest.mark.parametrize('tilt', [0, 5, 20])
def test_lengths_of_tubes_hold_for_the_slants_at_which_arms_are_filmed(tilt):
    tube = Tube(np.array([[-40, 12, 9, 0, 0], [-10, 7, 8, 2, -1], [15, 9, 6, 0, 1], [40, 11, 11, -2, 0]]))
    piece = Part('radius', [tube, Ellipsoid((0, 0, 4), (9, 14, 7), rotation_matrix(2, 30))]).moved(rotation_matrix(0, tilt)@rotation_matrix(2, tilt/2), (1, -2, 0))
    rays = beam('AP', 40, 100)
    place, length, _ = path_length(piece, rays)
    full = np.zeros((40, 40))
    full[place] = length
    truth = sampled(piece, rays)
    assert abs(full.sum()/truth.sum()-1)<.004
    assert np.abs(full-truth).mean()<(.03 if tilt<10 else .12)

def test_marrow_lies_within_bone_and_strips_do_not_show():
    arm = sample_arm(1)
    for p in pose_arm(arm, 80):
        place, outer, inner = path_length(p, beam('LAT', 150))
        again = path_length(p, beam('LAT', 150), strip=17)
        assert place==again[0]
        np.testing.assert_allclose(outer, again[1], atol=2e-3)
        if p.part in BONES: assert (inner<=outer+2e-2).all()

@pytest.mark.parametrize('n', range(1, 17))
def test_the_network_sorts_and_the_union_is_right(n):
    rng = np.random.default_rng(n)
    values = rng.integers(0, 9, (n, 200)).astype(np.float32)
    np.testing.assert_array_equal(sort_network(list(values)), np.sort(values, 0))
    t0, t1 = values, values+rng.integers(-2, 5, (n, 200)).astype(np.float32)
    ticks = np.arange(-2, 14)+.5                                      # whole numbers: count the unit cells that are covered
    covered = [sum(any(a<=k<=b for a,b in zip(t0[:, i], t1[:, i])) for k in ticks) for i in range(200)]
    np.testing.assert_allclose(union_length(list(zip(t0, t1))), covered, atol=1e-4)

@pytest.mark.parametrize('age', [2, 4, 6, 8, 10, 12, 14.5, 17, 40, 75])
@pytest.mark.parametrize('pathology', HURT)
def test_every_injury_at_every_age_shows_and_is_repeatable(pathology, age):
    for seed in (1, 2):
        healthy = sample_arm(seed, age)
        hurt = apply_injuries(healthy, [pathology], seed)
        changes = {view: np.abs(film(hurt, view)-film(healthy, view)).sum(0) for view in FILMS}
        near = {view: np.hypot(beam(view, 64).u, beam(view, 64).v)<60 for view in FILMS}
        assert max(changes[view][near[view]].max() for view in FILMS)>1.5, (pathology, age, seed)
        assert max((changes[view][near[view]]>.5).sum() for view in FILMS)>=4
    np.testing.assert_array_equal(film(hurt, 'LAT'), film(apply_injuries(sample_arm(seed, age), [pathology], seed), 'LAT'))

def test_injuries_to_the_ends_stay_at_the_ends():
    for pathology,view in (('medial epicondyle displaced', 'AP'), ('lateral epicondyle displaced', 'AP'), ('radial head fracture', 'AP'), ('olecranon fracture', 'LAT')):
        for seed in range(6):
            for age in (6, 12, 30):
                healthy = sample_arm(seed, age)
                change = np.abs(film(apply_injuries(healthy, [pathology], seed), view)-film(healthy, view))[0]
                rays = beam(view, 64)
                assert change.max()>.5 and change[np.hypot(rays.u, rays.v)>62].max()<1e-3, (pathology, seed, age)

def test_centres_appear_in_critoes_order_grow_and_fuse():
    for sex,late in (('F', 0), ('M', 1)):
        seen = {}
        for age in np.arange(.25, 20, .25):
            for name in set(OSSIFICATION_CENTERS) & {*(arm := sample_arm(5, age, sex)).upper, *arm.fore}: seen.setdefault(name, []).append(age)
        assert sorted(seen, key=lambda k: seen[k][0])==list(OSSIFICATION_CENTERS)
        assert {k: v[0] for k,v in seen.items()}=={k: o[1]+late for k,o in OSSIFICATION_CENTERS.items()}
        assert seen['medial epicondyle'][0]<seen['trochlea'][0]       # I before T
        assert all(14+late<=v[-1]+.25<=17+late for v in seen.values())
        volume = [sum(path_length((sample_arm(5, a, sex).upper)['capitellum'], beam('AP', 96))[1].ravel()) for a in (3, 6, 9, 12)]
        assert np.all(np.diff(volume)>0)

def test_a_growth_plate_is_a_gap_of_a_millimetre_or_two():
    arm = sample_arm(2, 12, 'F')
    rays = replace(beam('AP', 400, 100), origin=np.zeros(3))
    body, island = (arm.upper[k] for k in ('humerus', 'capitellum'))
    full = np.zeros((2, 400, 400))
    for o,p in zip(full, (body, island)):
        place, length, _ = path_length(p, rays)
        o[place] = length
    point, normal, gap, _ = island.cuts[-1]
    assert 1<2*gap*arm.scale<2.2
    assert (full.min(0)>0).sum()<(full.max(0)>0).sum()*.1             # the two hardly overlap

@pytest.mark.parametrize('age', [3, 8, 13, 30, 70])
def test_healthy_lines_are_in_range_and_injuries_break_them(age):
    facts = {v: [radiographic_measurements(points_on(sample_arm(s, age), v), v) for s in range(25)] for v in FILMS}
    assert all(o['radiocapitellar line']=='passes' for v in FILMS for o in facts[v])
    assert all(o['anterior humeral line']=='middle third' for o in facts['LAT'])
    assert all(60<o['Baumann angle']<84 and 3<o['carrying angle']<16 for o in facts['AP'])
    assert all(30<o['humerotrochlear angle']<50 for o in facts['LAT'])
    after = lambda p, v='LAT': [radiographic_measurements(points_on(apply_injuries(sample_arm(s, age), [p], s), v), v) for s in range(25)]
    for p in ('elbow dislocation anterior', 'elbow dislocation posterior', 'radial head subluxation'):
        assert all(o['radiocapitellar line']=='fails' for o in after(p)), p
    extension = [o['anterior humeral line'] for o in after('supracondylar fracture')]
    assert set(extension)<={'middle third', 'anterior third', 'in front'} and extension.count('middle third')<=10

def test_marks_move_with_the_bone_that_holds_them():
    for age in (6, 30):
        arm = sample_arm(4, age)
        moved = lambda p, name: np.linalg.norm(posed_landmarks(apply_injuries(arm, [p], 4), 90)[name]-posed_landmarks(arm, 90)[name])
        assert moved('olecranon fracture', 'olecranon')>.5 and moved('olecranon fracture', 'coronoid')==0
        assert moved('supracondylar fracture', 'capitellum')>.5 and moved('supracondylar fracture', 'shaft lower')==0
        assert moved('medial epicondyle displaced', 'medial epicondyle')>4 and moved('medial epicondyle displaced', 'trochlea')==0
        assert moved('elbow dislocation posterior', 'radial head')>20 and moved('elbow dislocation posterior', 'capitellum')==0
        assert moved('joint effusion', 'capitellum')==0

def test_all_pairs_of_injuries_can_happen_to_one_arm():
    for i,p in enumerate(HURT):
        for q in HURT[i+1:]:
            for age in (5, 12, 30): film(apply_injuries(sample_arm(i, age), [p, q], i), 'LAT', 32)

def test_sixteen_times_the_pixels_cost_less_than_sixteen_times_the_time():
    cv2.setNumThreads(1)
    arm = apply_injuries(sample_arm(0), ['supracondylar fracture'], 0)
    def seconds(size):
        rays, took = beam('LAT', size), []
        for _ in range(5):
            start = time.thread_time()
            for p in pose_arm(arm, 90):
                if p.part in BONES: path_length(p, rays)
            took.append(time.thread_time()-start)
        return np.median(took)
    seconds(64)
    assert seconds(1024)<16*seconds(256)

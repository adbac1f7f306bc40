"Simulated radiographs: identical bytes in every process, two views of one arm, correct ground truth"
import hashlib, json, subprocess, sys, time
from collections import Counter
import cv2
import numpy as np
import pytest
from elbowsynth.data.classes import PATHOLOGIES, region_of, REGIONS, VIEWS
from elbowsynth.paper import TABLE3
from elbowsynth.data.images import read_image
from elbowsynth.data.labels import read_labels
from elbowsynth.phantom.phantom import (
    ARTIFACTS, phantom, phantom_dataset_plan, read_ground_truth, sample_diagnoses,
    write_phantom_dataset)
from elbowsynth.phantom.artifacts import collimate
from elbowsynth.phantom.exposure import transmission
from conftest import ROOT

POINTS = {'olecranon fracture': 'olecranon', 'radial head fracture': 'radial head', 'radial head subluxation': 'radial head', 'joint effusion': 'capitellum',
          'medial epicondyle displaced': 'medial epicondyle', 'lateral epicondyle displaced': 'lateral epicondyle', 'proximal radial fracture': 'radial neck',
          'elbow dislocation posterior': 'olecranon', 'elbow dislocation anterior': 'coronoid', 'soft tissue swelling': 'capitellum'}

def phantom_hash(made):
    parts = [made.image, made.bones, made.overlay, *made.masks.values()]
    return hashlib.sha256(b''.join(np.ascontiguousarray(o).tobytes() for o in parts)+repr((made.landmarks, made.measurements, made.field, made.marker)).encode()).hexdigest()

REQUESTS = [('AP', ['normal'], 'L', 30, 1, 96, ()), ('LAT', ['supracondylar fracture', 'joint effusion'], 'R', 6, 2, 128, ARTIFACTS)]

def test_identical_bytes_in_other_processes():
    code = f'import sys; sys.path.insert(0, {str(ROOT/"tests")!r})\nfrom test_phantom import *\nprint(*[phantom_hash(phantom(*a)) for a in REQUESTS])'
    runs = [subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True, cwd=ROOT).stdout.split() for _ in range(2)]
    assert runs[0]==runs[1]==[phantom_hash(phantom(*a)) for a in REQUESTS]

@pytest.mark.parametrize('age', [5, 40])
def test_both_views_show_one_arm(age):
    for seed in range(4):
        ap, lat = (phantom(v, ['normal'], 'LR'[seed%2], age, seed, 96).landmarks for v in VIEWS)
        def heights(m): # of points along the humerus, relative to its visible shaft
            top, low = np.array(m['shaft upper']), np.array(m['shaft lower'])
            axis = (top-low)/((top-low)@(top-low))
            return [(np.array(m[k])-low)@axis for k in ('capitellum', 'trochlea', 'medial epicondyle', 'lateral epicondyle')]
        assert np.abs(np.subtract(heights(ap), heights(lat))).max()<.12, (seed, heights(ap), heights(lat))

def test_right_arm_is_mirror_image():
    for view in VIEWS:
        left, right = (phantom(view, ['olecranon fracture'], s, 30, 5, 128) for s in 'LR')
        assert (left.bones==right.bones[:, ::-1]).all() and (left.masks['olecranon fracture']==right.masks['olecranon fracture'][:, ::-1]).all()
        assert {k: pytest.approx((128-x, y)) for k, (x, y) in left.landmarks.items()}==right.landmarks
        assert left.measurements==pytest.approx(right.measurements)

@pytest.mark.parametrize('pathology', POINTS)
def test_mask_contains_the_injury(pathology):
    inside = []
    for seed in range(6):
        made = phantom(VIEWS[seed%2], [pathology], 'L', [5, 30][seed//2%2], seed, 128)
        x, y = (int(o) for o in made.landmarks[POINTS[pathology]])
        inside.append(made.masks[pathology][y, x])
    assert np.mean(inside)>.8, inside

def test_mask_area_agrees_with_the_paper():
    area = {p: np.mean([phantom(v, [p], seed=s, size=64).masks[p].mean() for s in range(5) for v in VIEWS]) for p in PATHOLOGIES}
    assert .25<=np.average([area[p] for p in TABLE3], weights=np.sum(list(TABLE3.values()), 1))<=.33
    for seed in range(5):
        a, b = phantom('LAT', ['olecranon fracture', 'joint effusion'], seed=seed, size=128).masks.values()   # both over the joint
        assert .4<(a&b).sum()/(a|b).sum()<.98

def test_masks_contain_background_and_are_connected():
    made = [phantom(v, ['soft tissue swelling'], seed=s, size=128) for s in range(4) for v in VIEWS]
    assert np.mean([((o.image<30) & o.masks['soft tissue swelling']).sum()/o.masks['soft tissue swelling'].sum() for o in made])>.05
    for o in made:
        outlines, _ = cv2.findContours(o.masks['soft tissue swelling'].astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
        assert len(outlines)==1

@pytest.mark.parametrize('annotation', ['overlay', 'colored overlay'])
def test_overlay_mask_is_what_differs(annotation):
    for seed in range(6):
        others = [n for n in ARTIFACTS[:5] if (seed+len(n))%3==0]
        plain, annotated = (phantom('AP', ['normal'], 'R', 30, seed, 200, n) for n in (others, others+[annotation]))
        image = annotated.image if annotated.image.ndim==3 else np.repeat(annotated.image[..., None], 3, 2)
        assert (annotated.image.ndim==3)==(annotation=='colored overlay')
        assert ((image!=plain.image[..., None]).any(2)==annotated.overlay).all() and not plain.overlay.any()
        assert .0005<annotated.overlay.mean()<.2
        assert plain.field==annotated.field and plain.marker==annotated.marker

def test_color_only_when_requested():
    for seed in range(8): assert np.ptp(phantom('AP', ['normal'], seed=seed, size=96, artifacts=['colored overlay']).image, axis=2).max()>60

def test_field_is_the_box_of_exposed_pixels():
    for seed in range(30):
        opening, shutter, (t, l, b, r) = collimate(120, (10, 15, 110, 100), np.random.default_rng(seed))
        exposed = opening>.5
        assert exposed[t:b, l:r].sum()==exposed.sum() and exposed[t].any() and exposed[b-1].any() and exposed[:, l].any() and exposed[:, r-1].any()
    for seed in range(8):
        made = phantom('AP', ['normal'], seed=seed, size=200, artifacts=['padding'])
        t, l, b, r = made.field
        out = np.ones(made.image.shape, bool)
        out[t:b, l:r] = False
        assert len(set(made.image[out].tolist()))==1 and (t, l, b, r)!=(0, 0, 200, 200)

def test_side_marker_is_visible_in_the_field():
    for seed in range(12):
        made = phantom(VIEWS[seed%2], ['normal'], 'LR'[seed%2], 30, seed, 256, ['collimation', 'padding'])
        (t, l, b, r), (y0, x0, y1, x1) = made.field, made.marker
        assert t<=y0<y1<=b and l<=x0<x1<=r
        letter = made.image[y0:y1, x0:x1]
        assert np.ptp(letter.astype(int))>120

def test_inverted_image_has_dark_bones():
    for seed in range(6):
        for view in VIEWS:
            plain, inverted = (phantom(view, ['normal'], seed=seed, size=128, artifacts=n) for n in ([], ['inversion']))
            assert plain.inverted is False and inverted.inverted is True
            assert plain.image[plain.bones>0].mean()>plain.image[plain.bones==0].mean()+40
            assert inverted.image[plain.bones>0].mean()<inverted.image[plain.bones==0].mean()-40

def test_bones_are_visible_with_all_artifacts():
    for seed in range(40):
        made = phantom(VIEWS[seed%2], [PATHOLOGIES[seed%14]], 'L', [4, 9, 50][seed%3], seed, 128, [n for n in ARTIFACTS if (seed*7+len(n))%3 and n!='colored overlay'])
        t, l, b, r = made.field
        shown, bones = made.image[t:b, l:r].astype(int), made.bones[t:b, l:r]>0
        bright = np.median(255-shown[bones] if made.inverted else shown[bones])
        assert 85<bright<252, (seed, bright, made.artifacts)

def test_severity_does_not_depend_on_image_size():
    for names in (['supracondylar fracture'], ['elbow dislocation posterior']):
        small, large = (phantom('LAT', names, seed=3, size=s) for s in (96, 384))
        assert np.allclose([np.divide(o, 96) for o in small.landmarks.values()], [np.divide(o, 384) for o in large.landmarks.values()])
        assert small.measurements==pytest.approx(large.measurements)

def test_beam_hardening():
    rng = np.random.default_rng(0)
    bone, soft = rng.random(100).astype(np.float32)*3, rng.random(100).astype(np.float32)*10
    assert (transmission(bone, soft)<=transmission(0*bone, soft)+1e-6).all() and (transmission(bone, soft)>=transmission(bone, 0*soft)*transmission(0*bone, soft)-1e-6).all()   # hardening

def test_pathologies_occur_as_in_table_3():
    cases = sample_diagnoses(2783)                                            # as many as images in the paper
    count = Counter(sum(cases, []))
    assert sum(count.values())==3017 and all(abs(count[p]-sum(n))<=1 for p, n in TABLE3.items()), count
    together = [c for c in cases if len(c)>1]
    assert len(together)>150 and {p for c in together for p in c[1:]}=={'joint effusion', 'soft tissue swelling'}
    assert all('normal' not in c and len(set(c))==len(c) for c in together)
    assert Counter(c[0] for c in together)['supracondylar fracture']>.3*len(together)

@pytest.mark.parametrize('n', [20, 21, 60, 61, 150])
def test_masks_of_normal_images_are_balanced_over_regions(n):
    images = [f for f in phantom_dataset_plan(n) if f['pathologies']==['normal']]
    for view in (*VIEWS, None):
        count = [sum(f['region']==r for f in images if view in (f['view'], None)) for r in REGIONS]
        assert max(count)-min(count)<=1, count

def test_folder_contains_all_ground_truth(tmp_path):
    table = write_phantom_dataset(tmp_path, 16, 64)
    assert read_labels(tmp_path).file.tolist()==table.file.tolist()
    truth = [json.loads(l) for l in (tmp_path/'ground_truth.jsonl').read_text().splitlines()]
    assert [t['file'] for t in truth]==list(dict.fromkeys(table.file))
    for t, r in zip(truth, table.drop_duplicates('file').itertuples()):
        assert (t['view'], t['side'], t['age'])==(r.view, r.side, r.age) and set(t['artifacts'])<=set(ARTIFACTS)
        t0, l0, b0, r0 = t['field']
        assert 0<=t0<b0<=64 and 0<=l0<r0<=64
        assert set(np.unique(read_image(tmp_path/'bones'/r.file)))<={0, 1, 2, 3} and read_image(tmp_path/r.mask).shape==(64, 64)
    assert {region_of(p) for p in table.pathology}=={*REGIONS, None}

def test_killed_run_resumes_with_identical_result(tmp_path):
    write_phantom_dataset(tmp_path/'a', 5, 48)
    write_phantom_dataset(tmp_path/'b', 5, 48)
    journal = tmp_path/'b'/'ground_truth.jsonl'
    journal.write_text(journal.read_text()[:len(journal.read_text())//2])   # as after a kill
    (tmp_path/'b'/'labels.csv').unlink()
    write_phantom_dataset(tmp_path/'b', 5, 48)
    files = [{p.relative_to(d): p.read_bytes() for p in d.rglob('*') if p.is_file()} for d in (tmp_path/'a', tmp_path/'b')]
    assert files[0]==files[1]
    assert len(read_ground_truth(tmp_path/'a'/'ground_truth.jsonl'))==10

def test_amount_of_artifacts(tmp_path):
    assert all(not f['artifacts'] for f in phantom_dataset_plan(30, artifacts=0))
    natural, severe = (sum(len(f['artifacts']) for f in phantom_dataset_plan(60, artifacts=k)) for k in (1., 2.))
    assert 60<natural<severe

def test_simulation_time():
    "Relative to a fixed amount of work on the same machine, so that a slow machine does not fail it"
    def median_seconds(f, n):
        times = []
        for i in range(n):
            start = time.thread_time()
            f(i)
            times.append(time.thread_time()-start)
        return np.median(times)
    noise = np.random.default_rng(0).random((512, 512), np.float32)
    cv2.setNumThreads(1)
    work = median_seconds(lambda i: np.exp(np.exp(-noise)).sum(), 15)
    for size, most in ((256, 120), (1024, 1000)):
        assert median_seconds(lambda i: phantom(VIEWS[i%2], [PATHOLOGIES[i%14]], seed=i, size=size), 9)<most*work

"""What the cells of `04_preprocess` cannot hold: many films, real ones, broken ones, and a run that is killed."""
import hashlib, io, json, signal, subprocess, sys, time
from pathlib import Path
import cv2, numpy as np, pandas as pd, pytest
from hypothesis import given, settings, strategies as st
from PIL import Image
from elbowsynth.core import parallel_map, root
from elbowsynth.data.classes import PATHOLOGIES
from elbowsynth.data.images import read_image
from elbowsynth.phantom.phantom import ARTIFACTS, phantom
from elbowsynth.data.preprocess import (
    clahe, crop_errors, crop_padding, CropGeometry, fix_polarity, from_square, original_to_square,
    preprocess, preprocess_folder, remove_overlay, square_frame, square_to_original,
    stretch_contrast, to_grayscale, to_square)

REAL = root().parent/'shared'/'radiographs'
real = pytest.mark.skipif(not REAL.is_dir(), reason='the two real films lie beside the checkout of those who have them')


# --- geometry

@st.composite
def geometries(draw):
    h,w = draw(st.integers(40, 2500)), draw(st.integers(40, 2500))
    t,l = draw(st.integers(0, h//3)), draw(st.integers(0, w//3))
    return CropGeometry(h, w, t, l, draw(st.integers(t+h//3, h)), draw(st.integers(l+w//3, w)), draw(st.sampled_from(['stretch', 'pad'])))

@given(geometries(), st.integers(32, 1024), st.floats(0, 1), st.floats(0, 1))
def test_points_go_there_and_back(g, size, u, v):
    film = np.array([[g.left+u*(g.right-g.left), g.top+v*(g.bottom-g.top)]])
    square = original_to_square(film, g, size)
    assert np.all((square>=-1e-6) & (square<=size+1e-6)), 'what was kept lies in the square'
    assert np.allclose(square_to_original(square, g, size), film, atol=1e-6)
    assert np.allclose(original_to_square(square_to_original([[u*size, v*size]], g, size), g, size), [[u*size, v*size]], atol=1e-6)

@settings(max_examples=40, deadline=None)
@given(geometries(), st.floats(.2, .8), st.floats(.2, .8), st.sampled_from([256, 512, 1024]))
def test_masks_go_there_and_back(g, u, v, size):
    "Within a pixel of whichever is coarser, the film or the square"
    t,l,b,r = square_frame(g)
    pixel = max(1, (b-t)/size, (r-l)/size)
    x, y = int(g.left+u*(g.right-g.left)), int(g.top+v*(g.bottom-g.top))
    rx, ry = max(4, int(.12*(g.right-g.left))), max(4, int(.12*(g.bottom-g.top)))
    mask = np.zeros((g.height, g.width), np.uint8)
    mask[max(g.top, y-ry):min(g.bottom, y+ry), max(g.left, x-rx):min(g.right, x+rx)] = 255
    square = to_square(mask, g, size)>127
    again = from_square(square.astype(np.uint8)*255, g)>127
    box = lambda m: np.array([f(np.flatnonzero(m.any(a))) for a in (1, 0) for f in (np.min, np.max)])
    assert np.abs(box(mask)-box(again)).max()<=pixel
    ys,xs = np.nonzero(square)
    corners = square_to_original([[xs.min(), ys.min()], [xs.max()+1, ys.max()+1]], g, size)
    assert np.abs(corners.ravel()[[1, 3, 0, 2]]-(box(mask)+[0, 1, 0, 1])).max()<=pixel


# --- right on films

def found(film):
    "What preprocessing found of a made-up film, against what is true"
    done, (bare, ink) = preprocess(film.image, 256), remove_overlay(film.image)
    g, grown = done.geometry, cv2.dilate(film.overlay.astype(np.uint8), np.ones((5, 5)))>0
    t,l,b,r = film.marker
    return {'polarity': done.report['inverted']!=film.inverted, 'crop': ' '.join(crop_errors(to_grayscale(bare), (g.top, g.left, g.bottom, g.right), film.field, grown)),
            'written': float((ink & film.overlay).sum()/max(1, film.overlay.sum())), 'letter': bool((ink & ~grown)[t:b, l:r].mean()>.1), 'seed': film.seed}

def test_polarity_and_crop_are_right_on_99_of_100():
    def one(i):
        nuisances = [o for o in ARTIFACTS if o!='coloured overlay' or i%2]
        age = float(np.random.default_rng([i, 7]).uniform(2, 70))
        return found(phantom(('AP', 'LAT')[i%2], [PATHOLOGIES[i%14]], 'LR'[i%3>0], age=age, seed=30_000+i, size=512, artifacts=nuisances))
    films = pd.DataFrame(list(parallel_map(one, range(500))))
    wrong = films[films.polarity | (films.crop!='')]
    assert len(wrong)<=5, wrong.to_string()
    assert films.written.mean()>.8, 'writing is left'
    assert films.letter.mean()<.02, 'lead letters were taken for writing'

def test_a_plain_film_is_left_alone():
    for i in range(40):
        film = phantom(('AP', 'LAT')[i%2], [PATHOLOGIES[i%14]], age=3+i, seed=i, size=512)
        seen = found(film)
        assert not seen['polarity'] and not seen['crop'] and not seen['letter'], (i, seen)
        assert not remove_overlay(film.image)[1].any(), i

def versions(image):
    "A film, its negative, and both in padding"
    for negative in (False, True):
        whole = 255-image if negative else image
        yield whole, negative, (0, 0)
        for grey in (0, 255, 90): yield np.pad(whole, ((100, 50), (80, 200)), constant_values=grey), negative, (100, 80)

@real
@pytest.mark.parametrize('name,field', [('AP', (0, 4, 1908, 1536)), ('LAT', (59, 0, 1920, 1516))])   # by eye
def test_real_films(name, field):
    image = to_grayscale(read_image(REAL/f'008_{name}.png'))
    for film,negative,(down,right) in versions(image):
        done = preprocess(film, 256)
        box = done.geometry.top-down, done.geometry.left-right, done.geometry.bottom-down, done.geometry.right-right
        assert done.report['inverted']==negative
        assert np.abs(np.subtract(box, field)).max()<=.02*1536, (box, field)
        assert done.report['overlay']==0, 'letter and wires are no writing'

def test_a_real_film_of_ten_bits():
    import data_store, pydicom
    film = pydicom.dcmread(Path(data_store.__file__).parent/'data'/'RG3_UNCR.dcm').pixel_array   # MONOCHROME1: bone is dark
    for image,negative in ((film, True), (1023-film, False)):
        done = preprocess(image.astype(np.uint16), 512)
        assert done.report['inverted']==negative and done.report['bits']==10 and done.report['overlay']==0
        assert np.abs(np.subtract((done.geometry.left, done.geometry.right), (455, 1250))).max()<=.02*1760   # the collimator's edges, by eye
        assert len(np.unique(done.image))>200


# --- depth

def test_one_film_at_four_depths():
    film = cv2.GaussianBlur(phantom('LAT', ['normal'], seed=4, size=512).image, (0, 0), 1.5)
    fine = cv2.GaussianBlur(film.astype(np.float32)*257, (0, 0), 2).astype(np.uint16)          # 16 bits that are really there
    squares = [preprocess(v, 256).image.astype(int) for v in ((fine/257).round().astype(np.uint8), (fine/16).astype(np.uint16), fine, 65535-fine)]
    for other in squares[1:]: assert np.abs(other-squares[0]).max()<=8 and np.abs(other-squares[0]).mean()<1
    assert len(np.unique(clahe(stretch_contrast(fine))))>20*len(np.unique(clahe(stretch_contrast((fine/257).astype(np.uint8)))))

@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(40, 300), st.integers(40, 300), st.floats(.5, 8))
def test_16_bits_are_what_opencv_does_at_8(seed, h, w, clip):
    film = cv2.GaussianBlur(np.random.default_rng(seed).integers(0, 256, (h, w)).astype(np.uint8), (0, 0), 1+seed%7)
    assert np.abs(clahe(film.astype(np.uint16)*257, clip)/257-clahe(film, clip)).max()<1.01

def test_arguments_are_left_as_they_were():
    for film in (phantom('AP', ['normal'], seed=1, size=256, artifacts=ARTIFACTS).image, np.full((64, 80), 7, np.uint16)):
        before = film.copy()
        for f in (preprocess, remove_overlay, crop_padding, fix_polarity): f(film)
        assert np.array_equal(film, before)

@settings(max_examples=30, deadline=None)
@given(st.integers(1, 90), st.integers(1, 90), st.sampled_from([np.uint8, np.uint16]), st.booleans(), st.integers(0, 10**6), st.sampled_from(['stretch', 'pad']))
def test_no_shape_is_too_odd(h, w, kind, colour, seed, fit):
    image = np.random.default_rng(seed).integers(0, np.iinfo(kind).max, (h, w, 3) if colour else (h, w)).astype(kind)
    done = preprocess(image, 64, aspect=fit)
    assert done.image.shape==(64, 64) and done.image.dtype==np.uint8
    json.dumps(done.report)


# --- files that are no films

def encoded(image, kind, **how):
    out = io.BytesIO()
    image.save(out, kind, **how)
    return out.getvalue()

def broken():
    "Name, bytes, and a word of the reason"
    grey = Image.fromarray(np.random.default_rng(0).integers(0, 255, (80, 60), dtype=np.uint8))
    png, jpeg = encoded(grey, 'PNG'), encoded(grey, 'JPEG')
    flipped = bytearray(png); flipped[len(png)//2] ^= 255
    yield from [('empty.png', b'', 'empty'), ('cut.png', png[:len(png)//2], 'cut off'), ('cut.jpg', jpeg[:-200], 'cut off'), ('flipped.png', bytes(flipped), 'damaged'),
                ('dot.png', encoded(grey.crop((0, 0, 1, 1)), 'PNG'), 'a film has'), ('huge.png', encoded(Image.new('1', (20_000, 20_000)), 'PNG'), 'more than 100,000,000'),
                ('cmyk.jpg', encoded(grey.convert('CMYK'), 'JPEG'), 'CMYK'), ('text.png', b'not an image at all'*9, 'none of PNG'), ('blank.png', encoded(Image.new('L', (80, 60)), 'PNG'), 'one grey'),
                ('float.tif', encoded(Image.fromarray(np.ones((80, 60), np.float32)), 'TIFF'), 'F, not grey'), ('dicom.png', bytes(128)+b'DICM'+bytes(99), 'elbowsynth.data.importers dicom')]
    for kind in ('GIF', 'PNG', 'WEBP', 'TIFF'): yield f'moving.{kind.lower()}', encoded(grey, kind, save_all=True, append_images=[grey.rotate(90, expand=False)]), 'holds 2 pictures'

def folder_of(where, files):
    where.mkdir()
    for name,content in files.items(): (where/name).write_bytes(content)
    rows = [f'{n},P{i},AP,L,normal' for i,n in enumerate(files)]
    (where/'labels.csv').write_text('\n'.join(['file,patient,view,side,pathology', *rows])+'\n')
    return where

def test_what_is_no_film_is_named(tmp_path):
    faults = {f'{i}_{n}': (c, why) for i,(n,c,why) in enumerate(broken())}
    good = encoded(Image.fromarray(phantom('AP', ['normal'], seed=1, size=128).image), 'PNG')
    folder = folder_of(tmp_path/'in', {'good.png': good} | {n: c for n,(c,_) in faults.items()})
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    films = preprocess_folder(folder, tmp_path/'out', 64)
    rejects = pd.read_csv(tmp_path/'out'/'rejects.csv', index_col='file').reason
    assert list(films.image)==['good'] and set(rejects.index)==set(faults)
    for name,(_,why) in faults.items(): assert why in rejects[name], (name, rejects[name])
    assert 'object at 0x' not in ' '.join(rejects)
    assert {p.name: p.read_bytes() for p in folder.iterdir()}==before, 'originals are never written'
    assert list(pd.read_csv(tmp_path/'out'/'pairs.csv').image)==['good']

def test_nothing_but_rejects_stops(tmp_path):
    folder = folder_of(tmp_path/'in', {f'{i}_{n}': c for i,(n,c,_) in enumerate(broken())})
    with pytest.raises(ValueError, match='rejects.csv says why'): preprocess_folder(folder, tmp_path/'out', 64)

@settings(max_examples=150, deadline=None)
@given(st.sampled_from(['PNG', 'JPEG', 'TIFF', 'GIF', 'WEBP', 'BMP', 'PPM']), st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), max_size=6), st.integers(0, 10**6))
@pytest.mark.filterwarnings('ignore')
def test_damaged_files_never_crash(tmp_path_factory, kind, changes, cut):
    raw = bytearray(encoded(Image.fromarray(np.arange(1200, dtype=np.uint16).reshape(40, 30).astype(np.uint8)), kind))
    for at,value in changes: raw[at%len(raw)] = value
    path = tmp_path_factory.mktemp('damaged')/'film.bin'
    path.write_bytes(bytes(raw[:1+cut%len(raw)] if cut%2 else raw))
    try: image = read_image(path)
    except ValueError as e: assert 'film.bin cannot be read' in str(e)
    else: assert image.dtype in (np.uint8, np.uint16) and image.ndim in (2, 3)

def test_films_of_many_kinds_are_read(tmp_path):
    grey = np.random.default_rng(0).integers(0, 255, (40, 30), dtype=np.uint8)
    deep = grey.astype(np.uint16)*257
    for name,image in (('a.png', deep), ('b.tif', deep), ('c.png', np.repeat(deep[..., None], 3, 2)), ('d.tif', np.repeat(deep[..., None], 3, 2))):
        cv2.imwrite(str(tmp_path/name), image)
        assert np.array_equal(read_image(tmp_path/name), image), name                          # 16 bits, with and without colour
    for mode,kind,want in (('1', 'PNG', 2), ('LA', 'PNG', 2), ('P', 'PNG', 3), ('RGBA', 'PNG', 3), ('L', 'GIF', 3), ('L', 'BMP', 2), ('L', 'TIFF', 2)):
        (tmp_path/'film').write_bytes(encoded(Image.fromarray(grey).convert(mode), kind))
        assert read_image(tmp_path/'film').ndim==want, (mode, kind)
    turned = Image.Exif()
    turned[274] = 6                                                                            # a phone held upright
    (tmp_path/'film').write_bytes(encoded(Image.fromarray(grey), 'JPEG', exif=turned, quality=95))
    assert read_image(tmp_path/'film').shape==(30, 40)

def test_contents_are_held_against_the_table(tmp_path):
    films = {f'{i}.png': encoded(Image.fromarray(phantom('AP', ['normal'], seed=i, size=128).image), 'PNG') for i in range(2)}
    folder = folder_of(tmp_path/'in', films)
    sums = [hashlib.sha256(films['0.png']).hexdigest(), hashlib.sha256(b'another film').hexdigest()]
    table = pd.read_csv(folder/'labels.csv').assign(sha256=sums, licence='CC0', group=['a', 'b'])
    table.to_csv(folder/'labels.csv', index=False)
    assert list(preprocess_folder(folder, tmp_path/'out', 64).image.astype(str))==['0']
    assert 'sha256' in pd.read_csv(tmp_path/'out'/'rejects.csv').reason[0]
    pairs = pd.read_csv(tmp_path/'out'/'pairs.csv')
    assert pairs.licence.tolist()==['CC0'] and pairs.group.tolist()==['a']


# --- a run that is killed, settings that change, a command

def many(tmp_path, n=30):
    return folder_of(tmp_path/'in', {f'{i}.png': encoded(Image.fromarray(phantom(('AP', 'LAT')[i%2], ['normal'], seed=i, size=256, artifacts=['padding']).image), 'PNG') for i in range(n)})

def contents(folder): return {p.name: p.read_bytes() for p in folder.iterdir()}

RUN = [sys.executable, '-m', 'elbowsynth.data.preprocess']

def test_a_kill_leaves_nothing_half_done(tmp_path):
    folder, whole = many(tmp_path), tmp_path/'whole'
    preprocess_folder(folder, whole, 512, n_threads=2)
    for wanted in (1, 7, 18):                                       # killed when that many films are there
        out = tmp_path/f'out{wanted}'
        run = subprocess.Popen([*RUN, folder, out, '--size', '512', '--jobs', '2'], stderr=subprocess.DEVNULL)
        while run.poll() is None and len(list(out.glob('[0-9]*.png')))<wanted: time.sleep(.002)
        run.send_signal(signal.SIGKILL)
        run.wait()
        for p in out.glob('[0-9]*.png'): assert p.read_bytes()==(whole/p.name).read_bytes()
        subprocess.run([*RUN, folder, out, '--size', '512'], check=True, capture_output=True)
        assert contents(out)==contents(whole)

def test_other_settings_come_and_go(tmp_path):
    folder, out = many(tmp_path, 3), tmp_path/'out'
    first = preprocess_folder(folder, out, 64)
    before = contents(out)
    preprocess_folder(folder, out, 96, aspect='pad')
    assert read_image(out/'0.png').shape==(96, 96)
    again = preprocess_folder(folder, out, 64)
    assert again.equals(first) and {n: c for n,c in contents(out).items() if n!='journal.jsonl'}=={n: c for n,c in before.items() if n!='journal.jsonl'}
    stamps = {p.name: p.stat().st_mtime_ns for p in out.glob('*.png')}
    preprocess_folder(folder, out, 64, n_threads=1)
    assert stamps=={p.name: p.stat().st_mtime_ns for p in out.glob('*.png')}, 'nothing is done twice'

def test_writing_is_kept_on_request(tmp_path):
    film = phantom('LAT', ['normal'], seed=2, size=512, artifacts=['overlay'])
    folder = folder_of(tmp_path/'in', {'a.png': encoded(Image.fromarray(film.image), 'PNG')})
    said = [subprocess.run([*RUN, folder, tmp_path/o, '--size', '512', *a], check=True, capture_output=True, text=True).stderr for o,a in (('bare', []), ('kept', ['--keep-overlay']))]
    bare, kept = (pd.read_csv(tmp_path/o/'images.csv').overlay[0] for o in ('bare', 'kept'))
    assert bare>0 and kept==0 and '1 with writing painted over' in said[0] and '0 with writing' in said[1]
    assert not np.array_equal(read_image(tmp_path/'bare'/'a.png'), read_image(tmp_path/'kept'/'a.png'))
    failed = subprocess.run([*RUN, tmp_path/'nowhere', tmp_path/'x'], capture_output=True, text=True)
    assert failed.returncode==1 and 'Traceback' not in failed.stderr

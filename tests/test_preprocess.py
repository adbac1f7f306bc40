"Preprocessing: many images, real ones, damaged ones, and a run that is killed"
import hashlib, io, json, signal, subprocess, sys, time
from pathlib import Path
import cv2, numpy as np, pandas as pd, pytest
from hypothesis import given, settings, strategies as st
from PIL import Image
from elbowsynth.core import parallel_map, root
from elbowsynth.data.classes import PATHOLOGIES
from elbowsynth.data.images import read_image, to_grayscale
from elbowsynth.data.preprocess import (
    clahe, crop_errors, crop_padding, CropGeometry, fix_polarity, from_square, original_to_square,
    preprocess, preprocess_folder, remove_overlay, square_frame, square_to_original,
    stretch_contrast, to_square)
from elbowsynth.phantom.phantom import ARTIFACTS, phantom

REAL = root().parent/'shared'/'radiographs'
real = pytest.mark.skipif(not REAL.is_dir(), reason='the two real radiographs are not part of the repository')


# --- geometry

@st.composite
def geometries(draw):
    h,w = draw(st.integers(40, 2500)), draw(st.integers(40, 2500))
    top, left = draw(st.integers(0, h//3)), draw(st.integers(0, w//3))
    bottom, right = draw(st.integers(top+h//3, h)), draw(st.integers(left+w//3, w))
    return CropGeometry(h, w, top, left, bottom, right, draw(st.sampled_from(['stretch', 'pad'])))

@given(geometries(), st.integers(32, 1024), st.floats(0, 1), st.floats(0, 1))
def test_points_are_mapped_there_and_back(g, size, u, v):
    original = np.array([[g.left+u*(g.right-g.left), g.top+v*(g.bottom-g.top)]])
    in_square = original_to_square(original, g, size)
    assert np.all((in_square>=-1e-6) & (in_square<=size+1e-6)), 'the crop box is inside the square'
    assert np.allclose(square_to_original(in_square, g, size), original, atol=1e-6)
    in_square = [[u*size, v*size]]
    restored = original_to_square(square_to_original(in_square, g, size), g, size)
    assert np.allclose(restored, in_square, atol=1e-6)

def mask_box(mask):
    "First and last row, first and last column of a mask"
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return np.array([rows.min(), rows.max(), columns.min(), columns.max()])

@settings(max_examples=40, deadline=None)
@given(geometries(), st.floats(.2, .8), st.floats(.2, .8), st.sampled_from([256, 512, 1024]))
def test_masks_are_mapped_there_and_back(g, u, v, size):
    "Within a pixel of the radiograph or of the square, whichever is larger"
    top,left,bottom,right = square_frame(g)
    pixel = max(1, (bottom-top)/size, (right-left)/size)
    x, y = int(g.left+u*(g.right-g.left)), int(g.top+v*(g.bottom-g.top))
    rx, ry = max(4, int(.12*(g.right-g.left))), max(4, int(.12*(g.bottom-g.top)))
    mask = np.zeros((g.height, g.width), np.uint8)
    mask[max(g.top, y-ry):min(g.bottom, y+ry), max(g.left, x-rx):min(g.right, x+rx)] = 255
    square = to_square(mask, g, size)>127
    restored = from_square(square.astype(np.uint8)*255, g)>127
    assert np.abs(mask_box(mask)-mask_box(restored)).max()<=pixel
    ys,xs = np.nonzero(square)
    corners = square_to_original([[xs.min(), ys.min()], [xs.max()+1, ys.max()+1]], g, size)
    assert np.abs(corners.ravel()[[1, 3, 0, 2]]-(mask_box(mask)+[0, 1, 0, 1])).max()<=pixel


# --- accuracy

def evaluate(radiograph):
    "Compare preprocessing of a simulated radiograph with the ground truth"
    done, (without_overlay, removed) = preprocess(radiograph.image, 256), remove_overlay(radiograph.image)
    g = done.geometry
    box = g.top, g.left, g.bottom, g.right
    near_overlay = cv2.dilate(radiograph.overlay.astype(np.uint8), np.ones((5, 5)))>0
    wrong_edges = crop_errors(to_grayscale(without_overlay), box, radiograph.field, near_overlay)
    top,left,bottom,right = radiograph.marker
    return {'polarity': done.report['inverted']!=radiograph.inverted, 'crop': ' '.join(wrong_edges),
            'overlay_removed': float((removed & radiograph.overlay).sum()/max(1, radiograph.overlay.sum())),
            'marker_removed': bool((removed & ~near_overlay)[top:bottom, left:right].mean()>.1),
            'seed': radiograph.seed}

@pytest.mark.parametrize('n', [60, pytest.param(500, marks=pytest.mark.long('500 simulated images, a minute'))])
def test_polarity_and_crop_are_correct_for_99_percent(n):
    def evaluate_one(i):
        artifacts = [a for a in ARTIFACTS if a!='colored overlay' or i%2]
        age = float(np.random.default_rng([i, 7]).uniform(2, 70))
        view, side = ('AP', 'LAT')[i%2], 'LR'[i%3>0]
        return evaluate(phantom(view, [PATHOLOGIES[i%14]], side, age=age, seed=30_000+i, size=512,
                                artifacts=artifacts))
    results = pd.DataFrame(list(parallel_map(evaluate_one, range(n))))
    wrong = results[results.polarity | (results.crop!='')]
    assert len(wrong)<=n/100, wrong.to_string()
    assert results.overlay_removed.mean()>.8
    assert results.marker_removed.mean()<.02, 'lead markers were taken for overlay'

def test_images_without_artifacts_are_left_unchanged():
    for i in range(40):
        radiograph = phantom(('AP', 'LAT')[i%2], [PATHOLOGIES[i%14]], age=3+i, seed=i, size=512)
        result = evaluate(radiograph)
        assert not result['polarity'] and not result['crop'] and not result['marker_removed'], (i, result)
        assert not remove_overlay(radiograph.image)[1].any(), i

def inverted_and_padded(image):
    "An image and its negative, without and with padding; whether inverted; padding above and to the left"
    for inverted in (False, True):
        whole = 255-image if inverted else image
        yield whole, inverted, (0, 0)
        for gray in (0, 255, 90):
            yield np.pad(whole, ((100, 50), (80, 200)), constant_values=gray), inverted, (100, 80)

@real
@pytest.mark.parametrize('name,field', [('AP', (0, 4, 1908, 1536)), ('LAT', (59, 0, 1920, 1516))]) # by eye
def test_real_radiographs(name, field):
    original = to_grayscale(read_image(REAL/f'008_{name}.png'))
    for image,inverted,(down,right) in inverted_and_padded(original):
        done = preprocess(image, 256)
        g = done.geometry
        box = g.top-down, g.left-right, g.bottom-down, g.right-right
        assert done.report['inverted']==inverted
        assert np.abs(np.subtract(box, field)).max()<=.02*1536, (box, field)
        assert done.report['overlay_fraction']==0, 'lead marker and wires are no overlay'

def test_a_real_radiograph_of_ten_bits():
    import data_store, pydicom
    path = Path(data_store.__file__).parent/'data'/'RG3_UNCR.dcm'
    original = pydicom.dcmread(path).pixel_array                    # MONOCHROME1: bone is dark
    for image,inverted in ((original, True), (1023-original, False)):
        done = preprocess(image.astype(np.uint16), 512)
        assert done.report['inverted']==inverted
        assert done.report['bit_depth']==10 and done.report['overlay_fraction']==0
        columns = done.geometry.left, done.geometry.right
        assert np.abs(np.subtract(columns, (455, 1250))).max()<=.02*1760 # edges of the collimator, by eye
        assert len(np.unique(done.image))>200


# --- bit depth

def test_the_bit_depth_does_not_change_the_result():
    image = cv2.GaussianBlur(phantom('LAT', ['normal'], seed=4, size=512).image, (0, 0), 1.5)
    image16 = cv2.GaussianBlur(image.astype(np.float32)*257, (0, 0), 2).astype(np.uint16) # uses all 16 bits
    image8, image12 = (image16/257).round().astype(np.uint8), (image16/16).astype(np.uint16)
    first, *others = (preprocess(v, 256).image.astype(int) for v in (image8, image12, image16, 65535-image16))
    for square in others: assert np.abs(square-first).max()<=8 and np.abs(square-first).mean()<1
    n_levels = len(np.unique(clahe(stretch_contrast(image16))))
    assert n_levels>20*len(np.unique(clahe(stretch_contrast((image16/257).astype(np.uint8)))))

@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(40, 300), st.integers(40, 300), st.floats(.5, 8))
def test_clahe_of_16_bits_agrees_with_opencv_at_8(seed, h, w, clip_limit):
    noise = np.random.default_rng(seed).integers(0, 256, (h, w)).astype(np.uint8)
    image = cv2.GaussianBlur(noise, (0, 0), 1+seed%7)
    result16, result8 = clahe(image.astype(np.uint16)*257, clip_limit), clahe(image, clip_limit)
    assert np.abs(result16/257-result8).max()<1.01

def test_arguments_are_not_modified():
    with_artifacts = phantom('AP', ['normal'], seed=1, size=256, artifacts=ARTIFACTS).image
    for image in (with_artifacts, np.full((64, 80), 7, np.uint16)):
        before = image.copy()
        for f in (preprocess, remove_overlay, crop_padding, fix_polarity): f(image)
        assert np.array_equal(image, before)

@settings(max_examples=30, deadline=None)
@given(st.integers(1, 90), st.integers(1, 90), st.sampled_from([np.uint8, np.uint16]), st.booleans(),
       st.integers(0, 10**6), st.sampled_from(['stretch', 'pad']))
def test_any_shape_is_preprocessed(h, w, dtype, color, seed, aspect):
    shape = (h, w, 3) if color else (h, w)
    image = np.random.default_rng(seed).integers(0, np.iinfo(dtype).max, shape).astype(dtype)
    done = preprocess(image, 64, aspect=aspect)
    assert done.image.shape==(64, 64) and done.image.dtype==np.uint8
    json.dumps(done.report)


# --- rejected files

def encode(image, format, **options):
    out = io.BytesIO()
    image.save(out, format, **options)
    return out.getvalue()

def invalid_files():
    "Name, bytes, and a part of the reason for the rejection"
    gray = Image.fromarray(np.random.default_rng(0).integers(0, 255, (80, 60), dtype=np.uint8))
    png, jpeg = encode(gray, 'PNG'), encode(gray, 'JPEG')
    flipped = bytearray(png)
    flipped[len(png)//2] ^= 255
    yield 'empty.png', b'', 'empty'
    yield 'cut.png', png[:len(png)//2], 'cut off'
    yield 'cut.jpg', jpeg[:-200], 'cut off'
    yield 'flipped.png', bytes(flipped), 'damaged'
    yield 'dot.png', encode(gray.crop((0, 0, 1, 1)), 'PNG'), 'expected 32 or more'
    yield 'huge.png', encode(Image.new('1', (20_000, 20_000)), 'PNG'), 'more than 100,000,000'
    yield 'cmyk.jpg', encode(gray.convert('CMYK'), 'JPEG'), 'CMYK'
    yield 'text.png', b'not an image at all'*9, 'none of PNG'
    yield 'blank.png', encode(Image.new('L', (80, 60)), 'PNG'), 'the same gray level'
    yield 'float.tif', encode(Image.fromarray(np.ones((80, 60), np.float32)), 'TIFF'), 'F, expected gray'
    yield 'dicom.png', bytes(128)+b'DICM'+bytes(99), 'elbowsynth.data.import_cli dicom'
    for format in ('GIF', 'PNG', 'WEBP', 'TIFF'):
        second = gray.rotate(90, expand=False)
        both = encode(gray, format, save_all=True, append_images=[second])
        yield f'moving.{format.lower()}', both, 'holds 2 images'

def write_folder(folder, files):
    folder.mkdir()
    rows = ['file,patient,view,side,pathology']
    for i,(name,content) in enumerate(files.items()):
        (folder/name).write_bytes(content)
        rows.append(f'{name},P{i},AP,L,normal')
    (folder/'labels.csv').write_text('\n'.join(rows)+'\n')
    return folder

def test_rejected_files_are_listed_with_the_reason(tmp_path):
    invalid = {f'{i}_{name}': (content, reason) for i,(name,content,reason) in enumerate(invalid_files())}
    good = encode(Image.fromarray(phantom('AP', ['normal'], seed=1, size=128).image), 'PNG')
    files = {'good.png': good} | {name: content for name,(content,_) in invalid.items()}
    folder = write_folder(tmp_path/'in', files)
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    images = preprocess_folder(folder, tmp_path/'out', 64)
    rejects = pd.read_csv(tmp_path/'out'/'rejects.csv', index_col='file').reason
    assert list(images.image)==['good'] and set(rejects.index)==set(invalid)
    for name,(_,reason) in invalid.items(): assert reason in rejects[name], (name, rejects[name])
    assert 'object at 0x' not in ' '.join(rejects)
    assert {p.name: p.read_bytes() for p in folder.iterdir()}==before, 'the originals are unchanged'
    assert list(pd.read_csv(tmp_path/'out'/'pairs.csv').image)==['good']

def test_a_folder_of_rejected_files_is_an_error(tmp_path):
    files = {f'{i}_{name}': content for i,(name,content,_) in enumerate(invalid_files())}
    folder = write_folder(tmp_path/'in', files)
    with pytest.raises(ValueError, match='see .*rejects.csv'): preprocess_folder(folder, tmp_path/'out', 64)

formats = st.sampled_from(['PNG', 'JPEG', 'TIFF', 'GIF', 'WEBP', 'BMP', 'PPM'])
changed_bytes = st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), max_size=6)

@settings(max_examples=150, deadline=None)
@given(formats, changed_bytes, st.integers(0, 10**6))
@pytest.mark.filterwarnings('ignore')
def test_damaged_files_never_crash(tmp_path_factory, format, changes, cut):
    pixels = np.arange(1200, dtype=np.uint16).reshape(40, 30).astype(np.uint8)
    raw = bytearray(encode(Image.fromarray(pixels), format))
    for position,value in changes: raw[position%len(raw)] = value
    path = tmp_path_factory.mktemp('damaged')/'image.bin'
    path.write_bytes(bytes(raw[:1+cut%len(raw)] if cut%2 else raw))
    try: image = read_image(path)
    except ValueError as e: assert 'image.bin cannot be read' in str(e)
    else: assert image.dtype in (np.uint8, np.uint16) and image.ndim in (2, 3)

def test_images_of_many_formats_are_read(tmp_path):
    gray = np.random.default_rng(0).integers(0, 255, (40, 30), dtype=np.uint8)
    gray16 = gray.astype(np.uint16)*257
    color16 = np.repeat(gray16[..., None], 3, 2)
    for name,image in (('a.png', gray16), ('b.tif', gray16), ('c.png', color16), ('d.tif', color16)):
        cv2.imwrite(str(tmp_path/name), image)
        assert np.array_equal(read_image(tmp_path/name), image), name
    path = tmp_path/'image'
    modes = [('1', 'PNG', 2), ('LA', 'PNG', 2), ('P', 'PNG', 3), ('RGBA', 'PNG', 3),
             ('L', 'GIF', 3), ('L', 'BMP', 2), ('L', 'TIFF', 2)]
    for mode,format,ndim in modes:
        path.write_bytes(encode(Image.fromarray(gray).convert(mode), format))
        assert read_image(path).ndim==ndim, (mode, format)
    turned = Image.Exif()
    turned[274] = 6                                                 # a camera held upright
    path.write_bytes(encode(Image.fromarray(gray), 'JPEG', exif=turned, quality=95))
    assert read_image(path).shape==(30, 40)

def test_files_are_compared_with_the_checksums_of_the_table(tmp_path):
    images = [phantom('AP', ['normal'], seed=i, size=128).image for i in range(2)]
    files = {f'{i}.png': encode(Image.fromarray(image), 'PNG') for i,image in enumerate(images)}
    folder = write_folder(tmp_path/'in', files)
    hashes = [hashlib.sha256(files['0.png']).hexdigest(), hashlib.sha256(b'another image').hexdigest()]
    table = pd.read_csv(folder/'labels.csv').assign(sha256=hashes, license='CC0', group=['a', 'b'])
    table.to_csv(folder/'labels.csv', index=False)
    assert list(preprocess_folder(folder, tmp_path/'out', 64).image.astype(str))==['0']
    assert 'sha256' in pd.read_csv(tmp_path/'out'/'rejects.csv').reason[0]
    pairs = pd.read_csv(tmp_path/'out'/'pairs.csv')
    assert pairs.license.tolist()==['CC0'] and pairs.group.tolist()==['a']


# --- interruption, other settings, the command

def write_phantoms(tmp_path, n=30):
    files = {}
    for i in range(n):
        made = phantom(('AP', 'LAT')[i%2], ['normal'], seed=i, size=256, artifacts=['padding'])
        files[f'{i}.png'] = encode(Image.fromarray(made.image), 'PNG')
    return write_folder(tmp_path/'in', files)

def contents(folder): return {p.name: p.read_bytes() for p in folder.iterdir()}

COMMAND = [sys.executable, '-m', 'elbowsynth.data.preprocess']

def test_a_killed_run_is_resumed(tmp_path):
    folder, reference = write_phantoms(tmp_path), tmp_path/'reference'
    preprocess_folder(folder, reference, 512, n_threads=2)
    for n_images in (1, 7, 18):                                     # killed when so many images are written
        out = tmp_path/f'out{n_images}'
        command = [*COMMAND, folder, out, '--size', '512', '--n-threads', '2']
        run = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        while run.poll() is None and len(list(out.glob('[0-9]*.png')))<n_images: time.sleep(.002)
        run.send_signal(signal.SIGKILL)
        run.wait()
        for p in out.glob('[0-9]*.png'): assert p.read_bytes()==(reference/p.name).read_bytes()
        subprocess.run([*COMMAND, folder, out, '--size', '512'], check=True, capture_output=True)
        assert contents(out)==contents(reference)

def test_changed_settings_are_applied_and_reverted(tmp_path):
    folder, out = write_phantoms(tmp_path, 3), tmp_path/'out'
    first = preprocess_folder(folder, out, 64)
    before = contents(out)
    preprocess_folder(folder, out, 96, aspect='pad')
    assert read_image(out/'0.png').shape==(96, 96)
    assert preprocess_folder(folder, out, 64).equals(first)
    after = contents(out)
    assert set(after)==set(before)
    for name in set(before)-{'journal.jsonl'}: assert after[name]==before[name], name
    times = {p.name: p.stat().st_mtime_ns for p in out.glob('*.png')}
    preprocess_folder(folder, out, 64, n_threads=1)
    assert times=={p.name: p.stat().st_mtime_ns for p in out.glob('*.png')}, 'nothing is processed twice'

def test_overlay_is_kept_on_request(tmp_path):
    image = phantom('LAT', ['normal'], seed=2, size=512, artifacts=['overlay']).image
    folder = write_folder(tmp_path/'in', {'a.png': encode(Image.fromarray(image), 'PNG')})
    outputs, fractions = [], []
    for name,options in (('removed', []), ('kept', ['--keep-overlay'])):
        command = [*COMMAND, folder, tmp_path/name, '--size', '512', *options]
        outputs.append(subprocess.run(command, check=True, capture_output=True, text=True).stderr)
        fractions.append(pd.read_csv(tmp_path/name/'images.csv').overlay_fraction[0])
    assert fractions[0]>0 and fractions[1]==0
    assert '1 with overlay removed' in outputs[0] and '0 with overlay removed' in outputs[1]
    assert not np.array_equal(read_image(tmp_path/'removed'/'a.png'), read_image(tmp_path/'kept'/'a.png'))
    failed = subprocess.run([*COMMAND, tmp_path/'nowhere', tmp_path/'x'], capture_output=True, text=True)
    assert failed.returncode==1 and 'Traceback' not in failed.stderr

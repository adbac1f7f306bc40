"Preprocessing: many images, real ones, damaged ones, and a run that is killed"
import hashlib, io, json, signal, subprocess, sys, time
from pathlib import Path
import cv2, numpy as np, pandas as pd, pytest
from hypothesis import given, settings, strategies as st
from PIL import Image
from elbowsynth.core import parallel_map, root
from elbowsynth.data.classes import PATHOLOGIES
from elbowsynth.data.images import read_image, to_grayscale
from elbowsynth.data.masks import estimate_joint, estimate_limb_axes, heuristic_mask
from elbowsynth.data.overlays import remove_overlay
from elbowsynth.data.preprocess import (
    clahe, crop_errors, crop_padding, CropGeometry, fix_polarity, from_square, main,
    original_to_square, preprocess, preprocess_folder, square_frame, square_to_original,
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
    is_crossed = radiograph.overlay[top:bottom, left:right].any()    # then it is taken out whole
    return {'polarity': done.report['inverted']!=radiograph.inverted, 'crop': ' '.join(wrong_edges),
            'overlay_removed': float((removed & radiograph.overlay).sum()/max(1, radiograph.overlay.sum())),
            'marker_removed': bool((removed & ~near_overlay)[top:bottom, left:right].mean()>.1),
            'marker_is_crossed': bool(is_crossed),
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
    is_free = ~results.marker_is_crossed
    assert results.marker_removed[is_free].mean()<.02, 'lead markers were taken for overlay'

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

@pytest.mark.long('killed processes, 12 s')
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


# --- every setting has its effect

def plain_square(seed=3):
    "A simulated radiograph of 256 x 256 that uses all gray levels, and needs no crop and no inversion"
    image = phantom('LAT', ['normal'], side='L', age=30, seed=seed, size=256).image.astype(float)
    return np.rint((image-image.min())/(image.max()-image.min())*255).astype(np.uint8)

def full_range(image):
    "Stretched so that one pixel in ten thousand is black, and one is white"
    ordered = np.sort(image.ravel())
    n = int(1e-4*image.size)
    low, high = int(ordered[n]), int(ordered[-n-1])
    return np.rint(np.clip((image.astype(float)-low)*255/(high-low), 0, 255)).astype(np.uint8)

@pytest.mark.parametrize('clip_limit', [1., 2., 4.5, 12.])
def test_the_clip_limit_is_that_of_opencv(clip_limit):
    image = plain_square()
    expected = cv2.createCLAHE(clip_limit, (8, 8)).apply(full_range(image)).astype(int)
    done = preprocess(image, 256, clahe_clip_limit=clip_limit)
    assert np.abs(done.image-expected).max()<=1
    deep = preprocess(image.astype(np.uint16)*257, 256, clahe_clip_limit=clip_limit)
    assert np.abs(deep.image-expected).mean()<.5

def test_size_and_aspect_are_applied():
    narrow = plain_square()[:, 60:220]
    stretched, padded = (preprocess(narrow, 128, aspect=a).image for a in ('stretch', 'pad'))
    assert stretched.shape==padded.shape==(128, 128)
    margin = int((256-160)/2*128/256)                               # columns of padding on either side
    assert not padded[:, :margin-1].any() and not padded[:, 129-margin:].any()
    assert stretched[:, :margin-1].any() and stretched[:, 129-margin:].any()

SETTINGS = {'size': (64, 96), 'aspect': ('stretch', 'pad'), 'clahe_clip_limit': (2., 9.),
            'keep_overlay': (False, True)}

@pytest.mark.parametrize('name', SETTINGS)
@pytest.mark.parametrize('entrance', ['preprocess', 'folder', 'command'])
def test_no_setting_is_ignored(tmp_path, name, entrance):
    "Each of two values gives another image, the same through every entrance"
    image = phantom('LAT', ['normal'], seed=2, size=320, artifacts=['overlay']).image[:, 20:]
    folder = write_folder(tmp_path/'in', {'a.png': encode(Image.fromarray(image), 'PNG')})

    def result(value):
        arguments = {'size': 64, name: value}
        if entrance=='preprocess': return preprocess(image, **arguments).image
        out = tmp_path/'out'                                        # one folder: the second value replaces the first
        if entrance=='folder': preprocess_folder(folder, out, **arguments)
        else:
            flags = []
            for n,v in arguments.items():
                flag = '--'+n.replace('_', '-')
                flags += ([flag] if v else []) if isinstance(v, bool) else [flag, str(v)]
            with pytest.raises(SystemExit) as end: main([str(folder), str(out), *flags])
            assert not end.value.code
        return read_image(out/'a.png')

    results = [result(value) for value in SETTINGS[name]]
    assert not np.array_equal(*results)
    for value,found in zip(SETTINGS[name], results):
        assert np.array_equal(found, preprocess(image, **{'size': 64, name: value}).image)


# --- borders and polarity of real archives; the images are made here

def arm_on_air(air=30., inverted=False, size=400):
    "A blurred arm and its bone (float32); `inverted` gives bright air"
    bone, tissue = np.zeros((2, 800, 800), np.float32)
    cv2.line(bone, (400, 100), (380, 420), 1, 90)
    cv2.line(bone, (380, 420), (620, 640), .9, 70)
    cv2.line(tissue, (400, 60), (380, 430), 1, 230)
    cv2.line(tissue, (380, 430), (660, 690), 1, 210)
    image = air+70*cv2.GaussianBlur(tissue, (0, 0), 10)+90*cv2.GaussianBlur(bone, (0, 0), 6)
    image = cv2.resize(image, (size, size), interpolation=cv2.INTER_AREA)
    return 235-image if inverted else image

def contour_in_air(level, step=.8, position=.73, side='right'):
    "Smooth air whose gray level falls by a little, an arm with noise, and a lead letter beyond the contour"
    y, x = np.mgrid[:500, :480].astype(np.float32)
    image = level+step*np.tanh((position*480-x)/30)
    image += np.exp(-((x-210)/75)**4)*130+np.exp(-((x-210)/22)**4)*60
    noise = np.random.default_rng(0).normal(0, 3, image.shape)
    image = np.where(image>level+6, image+noise, image)
    image = np.clip(np.rint(image), 0, 255).astype(np.uint8)
    cv2.putText(image, 'L', (415, 300), cv2.FONT_HERSHEY_SIMPLEX, .7, 230, 2)
    image = cv2.imdecode(cv2.imencode('.jpg', image, [cv2.IMWRITE_JPEG_QUALITY, 90])[1], 0)
    turns = {'right': 0, 'top': 1, 'left': 2, 'bottom': 3}[side]
    return np.rot90(image, turns).copy()

@pytest.mark.parametrize('side', ['right', 'top', 'left', 'bottom'])
@pytest.mark.parametrize('level', [12, 25, 128])
def test_a_contour_of_smooth_air_is_no_edge(level, side):
    image = contour_in_air(level, side=side)
    assert crop_padding(image)[1]==(0, 0, *image.shape)

def test_noise_beside_padding_of_nearly_the_same_gray_level_is_an_edge():
    noise = np.random.default_rng(1).normal(25.5, .5, (300, 280))
    image = np.rint(noise+60*np.exp(-((np.arange(280)-140)/40)**4)).astype(np.uint8)
    padded = np.pad(image, ((0, 0), (40, 0)), constant_values=24)
    assert np.abs(np.subtract(crop_padding(padded)[1], (0, 40, 300, 320))).max()<=2

def turned(image, degrees, gray_level, scale=.72):
    "Turned about its center, on padding of one gray level"
    h, w = image.shape
    matrix = cv2.getRotationMatrix2D((w/2, h/2), degrees, scale)
    return cv2.warpAffine(image, matrix, (w, h), borderValue=gray_level)

@pytest.mark.parametrize('inverted', [False, True])
@pytest.mark.parametrize('gray_level', [0, 100, 150, 190, 255])
def test_padding_around_a_turned_field_does_not_decide_the_polarity(gray_level, inverted):
    simulated = phantom('AP', ['normal'], seed=902, size=400).image
    if inverted: simulated = 255-simulated
    for image in (arm_on_air(inverted=inverted), simulated):
        framed = turned(image, 12, gray_level).astype(np.uint8)
        assert fix_polarity(framed)[1]==inverted

@pytest.mark.parametrize('inverted', [False, True])
@pytest.mark.parametrize('outside', [0, 255])
def test_a_round_diaphragm_does_not_decide_the_polarity(outside, inverted):
    y, x = np.mgrid[:400, :400]
    image = np.where((x-200)**2+(y-205)**2<188**2, arm_on_air(inverted=inverted), outside)
    assert fix_polarity(image.astype(np.uint8))[1]==inverted

@pytest.mark.parametrize('inverted', [False, True])
def test_shutters_between_two_exposures_do_not_decide_the_polarity(inverted):
    for seed in (903, 905):
        one = phantom('LAT', ['normal'], seed=seed, size=400).image[:, 75:325]
        if inverted: one = 255-one
        both = np.hstack([one, one[:, ::-1]])
        both[:110] = both[:, :30] = both[:, 240:262] = both[:, -30:] = 250
        assert fix_polarity(both)[1]==inverted

@pytest.mark.parametrize('inverted', [False, True])
def test_a_saturated_trunk_is_not_taken_for_air(inverted):
    y, x = np.mgrid[:400, :400]
    for seed in (900, 902, 903):
        image = phantom(('AP', 'LAT')[seed%2], ['normal'], age=20, seed=seed, size=400).image
        trunk = 300*cv2.GaussianBlur((y-.6*x>47).astype(np.float32), (0, 0), 9)
        image = np.clip(np.maximum(image, trunk), 0, 255).astype(np.uint8)
        assert fix_polarity(255-image if inverted else image)[1]==inverted


# --- burned-in text and lead letters; the images are made here

GREEN = (159, 220, 204)

def tissue(h, w, gray):
    "Soft tissue of one mean gray level, as RGB"
    noise = np.random.default_rng(0).normal(0, 14, (h, w)).astype(np.float32)
    image = np.clip(gray+cv2.GaussianBlur(noise, (0, 0), 1.2), 0, 255)
    return np.repeat(image.astype(np.uint8)[..., None], 3, 2)

def as_jpeg(image, quality=92):
    encoded = cv2.imencode('.jpg', image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
    return cv2.imdecode(encoded, cv2.IMREAD_COLOR)[..., ::-1].copy()

def lead_letter(image, x, y, gray=235):
    cv2.putText(image, 'L', (x, y), cv2.FONT_HERSHEY_SIMPLEX, 1.4, (gray,)*3, 4, cv2.LINE_AA)
    return np.s_[y-32:y+2, x:x+26]

def lead_fraction(original, cleaned, box):
    "How much of a lead letter is still bright"
    return (cleaned[box].max(2)>180).sum()/(original[box].min(2)>180).sum()

@pytest.mark.parametrize('distance', [6, 12, 20, 30, 60])
def test_a_lead_letter_beside_a_ruler_or_text_is_kept(distance):
    image = tissue(1200, 960, 25)
    cv2.line(image, (700, 300), (700, 900), GREEN, 2)
    for y in range(300, 901, 60): cv2.line(image, (686, y), (700, y), GREEN, 2)
    box = lead_letter(image, 700-distance-26, 520)
    assert lead_fraction(image, remove_overlay(as_jpeg(image))[0], box)>.9
    white_text = tissue(1200, 960, 25)
    for i,line in enumerate(('DOE JANE', '2000-01-02')):
        cv2.putText(white_text, line, (60, 500+34*i), cv2.FONT_HERSHEY_SIMPLEX, .7, (250,)*3, 1, cv2.LINE_AA)
    box = lead_letter(white_text, 60+170+distance, 530)
    cleaned, mask = remove_overlay(white_text)
    assert lead_fraction(white_text, cleaned, box)>.9
    assert mask[470:540, 60:200].any(), 'the text is removed'

@pytest.mark.parametrize('color', [GREEN, (250, 250, 250)])
def test_a_lead_letter_under_text_is_taken_out_whole_and_counted(color):
    image = tissue(1200, 960, 25)
    box = lead_letter(image, 140, 110)
    assert preprocess(image, 64).report['torn_markers']==0
    for i in range(3):
        place = (60, 60+36*i)
        cv2.putText(image, '2000-01-02 DOE', place, cv2.FONT_HERSHEY_SIMPLEX, .8, color, 2, cv2.LINE_AA)
    cleaned = remove_overlay(image)[0]
    assert (cleaned[box].max(2)>120).mean()<.03
    assert preprocess(image, 64).report['torn_markers']>=1
    assert preprocess(image, 64, keep_overlay=True).report['torn_markers']==0

@pytest.mark.parametrize('quality', [75, 90])
@pytest.mark.parametrize('gray', [30, 140, 180, 200])
def test_no_crumbs_of_pale_letters_over_bright_tissue(gray, quality):
    from PIL import ImageDraw, ImageFont
    import matplotlib
    fonts = Path(matplotlib.get_data_path())/'fonts'/'ttf'
    clean = tissue(475, 300, gray)
    for name,height in (('STIXGeneral.ttf', 14), ('DejaVuSerif.ttf', 16)):
        page = Image.fromarray(clean)
        pen, font = ImageDraw.Draw(page), ImageFont.truetype(fonts/name, height)
        for i,line in enumerate(('Test Person', '007Y', 'F', 'XY123456', '2000-01-02')):
            pen.text((8, 10+i*int(1.4*height)), line, font=font, fill=GREEN, stroke_width=1, stroke_fill=(0, 40, 32))
        image = as_jpeg(np.asarray(page), quality)
        is_drawn = np.abs(to_grayscale(image).astype(int)-clean[..., 0])>45
        left = np.abs(to_grayscale(remove_overlay(image)[0]).astype(int)-clean[..., 0])>45
        assert is_drawn.sum()>300 and left.sum()<=.02*is_drawn.sum(), (name, left.sum(), is_drawn.sum())

def rotated_text(degrees, lines, size=900):
    "White lines of text on gray tissue, and where they are"
    canvas = np.zeros((size, size), np.uint8)
    for i,line in enumerate(lines):
        cv2.putText(canvas, line, (250, 400+34*i), cv2.FONT_HERSHEY_SIMPLEX, .7, 255, 2, cv2.LINE_AA)
    canvas = cv2.warpAffine(canvas, cv2.getRotationMatrix2D((400, 400), degrees, 1), (size, size))
    return np.maximum(tissue(size, size, 40)[..., 0], canvas), canvas>128

@pytest.mark.parametrize('degrees', [-12, -7, 4, 9, 14])
def test_tilted_words_are_removed(degrees):
    image, letters = rotated_text(degrees, ['RADIOLOGY WARD'])
    assert (remove_overlay(image)[1] & letters).sum()>.95*letters.sum()

def test_short_second_lines_are_removed():
    image, letters = rotated_text(0, ['DOE JANE', 'F', 'M 7'])
    assert (remove_overlay(image)[1] & letters).sum()>.95*letters.sum()


# --- directions of the limbs

def turned_arm(view, seed, quarters, tilt):
    "A preprocessed simulated arm, turned, and the true directions of humerus and forearm"
    made = phantom(view, ['normal'], 'LR'[seed%2], age=10+5*(seed%9), seed=seed, size=192)
    done = preprocess(made.image, 192)
    spots = original_to_square([made.landmarks[k] for k in ('capitellum', 'shaft upper', 'distal forearm')],
                               done.geometry, 192)
    matrix = cv2.getRotationMatrix2D((96, 96), 90*quarters+tilt, 1)
    image = cv2.warpAffine(done.image, matrix, (192, 192), borderValue=int(np.quantile(done.image, .05)))
    limbs = (spots[1:]-spots[0])@matrix[:, :2].T
    return image, limbs/np.linalg.norm(limbs, axis=1, keepdims=True)

@pytest.mark.parametrize('quarters', range(4))
def test_limbs_are_found_in_any_orientation_or_not_at_all(quarters):
    n_found = 0
    for i in range(12):
        image, truth = turned_arm(('LAT', 'LAT', 'AP')[i%3], 40+i, quarters, (-20, 0, 15)[i%3])
        axes = estimate_limb_axes(image, estimate_joint(image))
        if axes[0] is None: continue
        right = (np.array(axes)*truth).sum(1)>np.cos(np.radians(30))
        n_found += bool(right.all())
        assert right.all() or quarters==2, (i, axes, truth)
    assert n_found>=10

def test_no_direction_is_claimed_without_limbs():
    for image in (np.full((96, 96), 90, np.uint8), cv2.circle(np.zeros((96, 96), np.uint8), (48, 48), 30, 200, -1)):
        assert estimate_limb_axes(image, np.array([.5, .5]))==(None, None)
    blob = cv2.circle(np.zeros((96, 96), np.uint8), (48, 48), 30, 200, -1)
    for region in ('humerus', 'forearm', 'whole arm', 'joint'):
        y, x = np.nonzero(heuristic_mask(blob, region, 'a'))
        assert abs(x.mean()-47.5)<5 and abs(y.mean()-47.5)<5, 'a mask around the joint'
        assert .7<np.ptp(x)/np.ptp(y)<1.4

@real
@pytest.mark.parametrize('name,forearm', [('AP', (.1, 1)), ('LAT', (-1, 0))])
def test_limbs_of_real_radiographs(name, forearm):
    image = preprocess(read_image(REAL/f'008_{name}.png'), 256).image
    for quarters in range(4):
        turn = np.array([[0, 1], [-1, 0]])                          # (x, y) when turned to the left by 90 degrees
        truth = [np.linalg.matrix_power(turn, quarters)@v for v in ((0, -1), forearm)]
        turned_image = np.rot90(image, quarters).copy()
        axes = estimate_limb_axes(turned_image, estimate_joint(turned_image))
        assert ((np.array(axes)*truth).sum(1)>np.cos(np.radians(30))).all(), (quarters, axes)


# --- collimated fields

def frame_of_scatter(step, seed=0):
    "A field of 120 to 544 by 88 to 432 in a noisy frame that is brighter by a low, soft step"
    rng = np.random.default_rng(seed)
    inner = .8*cv2.resize(phantom(('AP', 'LAT')[seed%2], ['normal'], seed=seed, size=400).image.astype(np.float32), (344, 424))
    image = np.full((640, 512), 60, np.float32)
    image[120:544, 88:432] = np.maximum(60-step, inner)
    image = cv2.GaussianBlur(image, (0, 0), 1.5)+cv2.GaussianBlur(rng.normal(0, 6, image.shape), (0, 0), 1)
    return np.clip(image, 0, 255).astype(np.uint8)

@pytest.mark.parametrize('step', [6, 12, 18, 36])
def test_a_frame_behind_a_low_soft_step_is_cropped(step):
    for seed in (0, 1):
        box = crop_padding(frame_of_scatter(step, seed))[1]
        assert np.abs(np.subtract(box, (120, 88, 544, 432))).max()<=8, box

@pytest.mark.parametrize('gray_level', [0, 110, 255])
@pytest.mark.parametrize('degrees', [4, 12, -25])
def test_wedges_of_a_turned_field_become_black(degrees, gray_level):
    for inverted in (False, True):
        simulated = phantom('AP', ['normal'], seed=902, size=400).image
        simulated = np.maximum(simulated, 25)
        image = turned(255-simulated if inverted else simulated, degrees, gray_level)
        inside = turned(np.full((400, 400), 255, np.uint8), degrees, 0)
        done = preprocess(image, 256)
        if degrees!=4: assert abs(done.report['masked_fraction']-(to_square(inside, done.geometry, 256)<5).mean())<.03
        square = to_square(inside, done.geometry, 256)
        assert done.report['inverted']==inverted
        outside = square<5
        assert (outside & (done.image>0)).mean()<.035, 'nothing but a seam and small corners remain'
        rows, columns = np.flatnonzero((inside>0).any(1)), np.flatnonzero((inside>0).any(0))
        g, true_box = done.geometry, (rows[0], columns[0], rows[-1]+1, columns[-1]+1)
        assert np.abs(np.subtract((g.top, g.left, g.bottom, g.right), true_box)).max()<=15

def test_arms_and_casts_are_no_wedges():
    for i in range(24):
        image = phantom(('AP', 'LAT')[i%2], [PATHOLOGIES[i%14]], age=3+2*i, seed=60+i, size=320).image
        for version in (image, 255-image):
            done = preprocess(version, 64)
            assert done.report['masked_fraction']==0 and done.report['kept_fraction']>.97

"The manifest, masks and the split: properties, second opinions, and inputs that are known to be bad"
import json, time, zlib
import cv2, numpy as np, pandas as pd
import pytest
from hypothesis import given, settings, strategies as st
from skimage.draw import polygon2mask
from elbowsynth.data.labels import labels as data, masks
from elbowsynth.data.classes import caption, PATHOLOGIES, region_of, REGIONS, VIEWS
from elbowsynth.paper import TABLE3
from elbowsynth.data.labels import LabelsError, read_labels, read_pairs, write_manifest
from elbowsynth.data.split import (
    class_counts, patient_groups, split_deviations, stratified_group_split)
from elbowsynth.data.images import write_png
from elbowsynth.data.masks import (
    check_masks, estimate_joint, estimate_limb_axes, heuristic_mask, mask_area_table, mask_regions,
    write_masks)
from elbowsynth.data.annotations import (
    box_polygon, decode_rle, ellipse_polygon, merge_masks, polygon_mask, rasterize_masks, read_coco,
    read_labelme, read_shapes, read_via, read_yolo, rle_polygons)
from elbowsynth.data.labels import pair_name
from elbowsynth.phantom.phantom import phantom, sample_artifacts
from elbowsynth.data.preprocess import preprocess_folder
from elbowsynth.data.split import format_shares, small_classes, view_counts, write_split

def flat(grey=90, shape=(40, 50)): return np.random.default_rng(grey).integers(0, 255, shape).astype(np.uint8)

def folder_of(top, rows, header='file,patient,view,side,pathology,mask,group,licence,sha256,age'):
    "A folder with a film for each row, and its table"
    for r in rows:
        name = r.split(',')[0]
        if name and not (top/name).exists(): write_png(top/name, flat(zlib.crc32(name.encode())))
    (top/'labels.csv').write_text('\n'.join([header, *rows]))
    return top

# ---------------------------------------------------------------------------------------------------------------------------- words

def test_captions_are_the_papers():
    assert caption('LAT', ['soft tissue swelling', 'supracondylar fracture'])=='A lateral x-ray of an elbow displaying soft tissue swelling, supracondylar fracture'
    assert caption('AP', ['normal'])=='An anteroposterior x-ray of an elbow displaying normal'
    assert caption('LAT', ['supracondylar fracture', 'soft tissue swelling']).endswith('displaying supracondylar fracture, soft tissue swelling')
    assert caption('AP', set(PATHOLOGIES[:13]))=='An anteroposterior x-ray of an elbow displaying '+', '.join(PATHOLOGIES[:13])
    for view, names in (('LAT', []), ('LAT', ['normal', 'joint effusion']), ('LAT', ['joint effusion']*2), ('PA', ['normal']), ('LAT', ['sprain'])):
        with pytest.raises(ValueError): caption(view, names)

# ------------------------------------------------------------------------------------------------------------------------- manifest

FAULTS = {'f.png,P1,LAT,L,broken,,,,,': "unknown pathology 'broken'", 'f.png,P1,oblique,L,normal,,,,,': "unknown view 'oblique'", 'f.png,P1,AP,both,normal,,,,,': "unknown side 'both'",
          'f.png,,AP,L,normal,,,,,': 'empty patient', ',P1,AP,L,normal,,,,,': 'empty file', '../f.png,P1,AP,L,normal,,,,,': "no such file in the folder: '../f.png'",
          'f.png,P1,AP,L,normal,gone.png,,,,': "no such file in the folder: 'gone.png'", 'f.png,P1,AP,L,normal,/etc/hostname,,,,': "no such file in the folder: '/etc/hostname'",
          'f.png,P1,AP,L,normal,,,,abc,': 'sha256 is not of 64 hexadecimal digits', 'f.png,P1,AP,L,normal,,,,,old': "age is not in years, from 0 to 120: 'old'",
          'f.png,P1,AP,L,normal,,,,,-3': 'age is not in years', 'f.png,P1,AP,L,normal,,,,,900': 'age is not in years',
          'f.png,P1,,L,normal,,,,,': '1 film without a view: fill in AP or LAT', 'f.png,P1,AP,,normal,,,,,': '1 film without a side: fill in L or R',
          'f.png,P1,AP,L,,,,,,': '1 film without a pathology: fill in one of the 14', 'f.png,P1,AP,L,normal,torn.png,,,,': 'torn.png',
          'f.png,P1,AP,L,normal,small.png,,,,': 'a mask of (9, 9), while f.png is (40, 50)', 'f.png,P1,AP,L,normal,black.png,,,,': 'a mask in which nothing is white'}

@pytest.mark.parametrize('row', FAULTS)
def test_each_fault_of_a_row_is_named(tmp_path, row):
    write_png(tmp_path/'small.png', np.full((9, 9), 255, np.uint8)); write_png(tmp_path/'black.png', np.zeros((40, 50), np.uint8))
    (tmp_path/'torn.png').write_bytes((tmp_path/'small.png').read_bytes()[:50])
    write_png(tmp_path/'f.png', flat()); write_png(tmp_path.parent/'f.png', flat())
    (tmp_path/'labels.csv').write_text('file,patient,view,side,pathology,mask,group,licence,sha256,age\n\n'+row)
    with pytest.raises(LabelsError) as e: read_labels(tmp_path)
    assert FAULTS[row] in str(e.value)
    if 'film without' not in str(e.value): assert 'row 3, ' in str(e.value)                   # as a spreadsheet counts, the empty line included

PAIRS_OF_ROWS = {('f.png,P1,AP,L,normal,,,,,', 'f.png,P1,AP,L,joint effusion,,,,,'): 'both normal and a pathology',
                 ('f.png,P1,AP,L,normal,,,,,', 'f.png,P1,AP,L,normal,,,,,'): 'stand in an earlier row',
                 ('a/f.png,P1,AP,L,normal,,,,,', 'b/f.png,P1,AP,L,normal,,,,,'): 'two files of one name: a/f.png, b/f.png',
                 **{(f'f.png,P1,AP,L,joint effusion,,g,CC0,{"a"*64},7', f'f.png,{o}'): f'rows disagree about its {k}' for k,o in (
                     ('patient', f'P2,AP,L,olecranon fracture,,g,CC0,{"a"*64},7'), ('view', f'P1,LAT,L,olecranon fracture,,g,CC0,{"a"*64},7'), ('side', f'P1,AP,R,olecranon fracture,,g,CC0,{"a"*64},7'),
                     ('group', f'P1,AP,L,olecranon fracture,,h,CC0,{"a"*64},7'), ('licence', f'P1,AP,L,olecranon fracture,,g,MIT,{"a"*64},7'),
                     ('sha256', f'P1,AP,L,olecranon fracture,,g,CC0,{"b"*64},7'), ('age', f'P1,AP,L,olecranon fracture,,g,CC0,{"a"*64},8'))}}

@pytest.mark.parametrize('rows', PAIRS_OF_ROWS)
def test_contradictions_are_named(tmp_path, rows):
    with pytest.raises(LabelsError, match=PAIRS_OF_ROWS[rows]): read_labels(folder_of(tmp_path, rows))

def test_all_faults_come_in_one_report_and_line_by_line(tmp_path):
    rows = [r.replace('f.png', f'f{i}.png') for i,r in enumerate(FAULTS) if 'png,,,,' not in r and '..' not in r and 'hostname' not in r]
    with pytest.raises(LabelsError) as e: read_labels(folder_of(tmp_path, rows))
    text = str(e.value)
    for r in rows: assert FAULTS[next(k for k in FAULTS if k.split(',')[1:]==r.split(',')[1:])] in text
    lines = [int(l.split()[1].rstrip(',')) for l in text.splitlines() if l.startswith('  row')]
    assert lines==sorted(lines) and f'{len(text.splitlines())-1} faults' in text

def test_films_without_view_are_listed_together(tmp_path):
    rows = [f'f{i}.png,P{i},{"AP" if i%3 else ""},{"L" if i%2 else ""},normal,,,,,' for i in range(6)]
    with pytest.raises(LabelsError) as e: read_labels(folder_of(tmp_path, rows))
    assert '2 films without a view: fill in AP or LAT (an importer does so where the files themselves say it): f0.png, f3.png' in str(e.value)
    assert '3 films without a side' in str(e.value) and 'row' not in str(e.value)

def test_the_same_film_under_two_patients(tmp_path):
    rows = ['a.png,P1,AP,L,normal,,,,,', 'b.png,P2,AP,L,normal,,,,,', 'c.png,P3,AP,L,normal,,,,,']
    folder_of(tmp_path, rows)
    (tmp_path/'b.png').write_bytes((tmp_path/'a.png').read_bytes())
    with pytest.raises(LabelsError, match='row 3, b.png: the same bytes as a.png of patient P1: remove one of them, or give both one `group`'): read_labels(tmp_path)
    folder_of(tmp_path, [r.replace('normal,,,', 'normal,,copies,') for r in rows[:2]])
    assert patient_groups(read_labels(tmp_path)).nunique()==1                                           # kept, and kept together
    folder_of(tmp_path, [rows[0], rows[1].replace('P2', 'P1')])
    assert len(read_labels(tmp_path))==2
    folder_of(tmp_path, [f'{n}.png,P{n},AP,L,normal,,,,{"c"*64},' for n in 'cd'])
    with pytest.raises(LabelsError, match='d.png: the same bytes as c.png'): read_labels(tmp_path)

def test_csv_and_parquet_say_the_same(tmp_path):
    table = pd.DataFrame({'File': ['a.png', 'a.png', 'b.png'], 'patient': [1, 1, 2], 'VIEW': ['Lateral', 'LAT', 'ap'], 'side': ['left', 'L', 'R'], 'pathology': ['Joint_Effusion', 'olecranon fracture', 'normal'],
                          'age': [7.5, 7.5, None], 'licence': ['CC BY 4.0', 'CC BY 4.0', None], 'other': [1, 2, 3]})
    for name in 'ab': write_png(tmp_path/f'{name}.png', flat(len(name)+ord(name)))
    table.to_csv(tmp_path/'labels.csv', index=False, sep=';', encoding='utf-8-sig')
    one = read_labels(tmp_path)
    (tmp_path/'labels.csv').unlink()
    table.to_parquet(tmp_path/'labels.parquet')
    pd.testing.assert_frame_equal(one, read_labels(tmp_path))
    assert list(one)==['file', 'patient', 'view', 'side', 'pathology', 'mask', 'group', 'licence', 'sha256', 'age', 'image']
    assert one.iloc[0].tolist()==['a.png', '1', 'LAT', 'L', 'joint effusion', '', '', 'CC BY 4.0', '', '7.5', 'a'] and one.age[2]==''
    table['age'] = 'old'
    table.to_parquet(tmp_path/'labels.parquet')
    with pytest.raises(LabelsError, match="row 2, a.png: age"): read_labels(tmp_path)

@pytest.mark.parametrize('suffix', ['csv', 'parquet'])
def test_what_is_written_is_read(tmp_path, suffix):
    write_png(tmp_path/'a.png', flat())
    table = pd.DataFrame([['a.png', 'P1', 'AP', 'L', 'normal', 'x, "y"; z']], columns=[*data.COLUMNS, 'licence'])
    write_manifest(tmp_path, table, f'labels.{suffix}')
    back = read_labels(tmp_path)
    assert back.licence[0]=='x, "y"; z' and back.sha256[0]==data.file_sha256(tmp_path/'a.png') and len(back.sha256[0])==64

def test_films_are_not_decoded_for_the_manifest(tmp_path, monkeypatch):
    "Thousands of films are checked in seconds; one that cannot be decoded is left to the stage that decodes it"
    rows = [f'f{i}.png,P{i},AP,L,normal,{"m.png" if i==7 else ""},,,,' for i in range(40)]
    folder_of(tmp_path, rows)
    write_png(tmp_path/'m.png', np.full((40, 50), 255, np.uint8))
    (tmp_path/'f3.png').write_bytes(b'no picture')
    read, decode = [], data.read_image
    monkeypatch.setattr(data, 'read_image', lambda p: (read.append(p.name), decode(p))[1])
    assert len(read_labels(tmp_path))==40 and read==['m.png']

def test_a_large_manifest_is_checked_fast(tmp_path):
    folder_of(tmp_path, [f'f{i}.png,P{i//2},AP,L,{p},,,,,' for i in range(1500) for p in ('joint effusion', 'olecranon fracture')])
    before = time.process_time()
    assert len(read_labels(tmp_path))==3000
    assert time.process_time()-before<5

# ----------------------------------------------------------------------------------------------------------------- polygons, boxes

points = st.lists(st.tuples(st.floats(-5, 45), st.floats(-5, 35)), min_size=3, max_size=9)

@settings(deadline=None, max_examples=200)
@given(points)
def test_polygons_are_filled_as_another_library_fills_them(corners):
    mine, theirs = polygon_mask([np.array(corners)], 30, 40), polygon2mask((30, 40), np.array(corners)[:, ::-1]-.5)
    differ = mine!=theirs
    if not differ.any(): return
    outline = np.vstack([corners, corners[:1]])                                                # only centres on the line itself may differ
    d = [min(abs((b-a)[0]*(y+.5-a[1])-(b-a)[1]*(x+.5-a[0]))/max(1e-9, np.hypot(*(b-a))) for a,b in zip(outline, outline[1:])) for y,x in np.argwhere(differ)]
    assert max(d)<1e-6

@given(*[st.integers(-8, 40)]*2, *[st.integers(1, 50)]*2)
def test_boxes_cover_their_area(x, y, w, h):
    whole = np.zeros((30, 40), bool)
    whole[max(0, y):max(0, y+h), max(0, x):max(0, x+w)] = True
    assert (polygon_mask([box_polygon(x, y, w, h)], 30, 40)==whole).all()

def packed(runs):
    "COCO's text for counts of pixels, written from its description"
    text = ''
    for i,n in enumerate(runs):
        x = n-runs[i-2] if i>2 else n
        while True:
            five, x = x & 31, x>>5
            last = x==(-1 if five & 16 else 0)
            text += chr((five if last else five | 32)+48)
            if last: break
    return text

@settings(deadline=None)
@given(st.integers(1, 20), st.integers(1, 20), st.integers(0, 2**32-1), st.floats(.02, .98))
def test_runs_of_pixels_come_back(h, w, seed, share):
    m = np.random.default_rng(seed).random((h, w))<share
    down, runs, colour = m.T.ravel(), [0], False
    for v in down:
        if v!=colour: runs.append(0); colour = v
        runs[-1] += 1
    assert decode_rle(packed(runs))==runs
    assert (polygon_mask(rle_polygons(packed(runs), h, w), h, w)==m).all()

def test_runs_as_the_reference_tool_packs_them():
    m = np.zeros((40, 50), bool)
    m[5:33, 7:41], m[10:20, 20:30] = True, False
    text = 'm8l0<000000000000000000000000YON82HN82HN82HN82HN82HN82HN82HN82HN82HN82?00000000000000000000S;'     # of pycocotools 2.0.11
    assert (polygon_mask(rle_polygons(text, 40, 50), 40, 50)==m).all()
    with pytest.raises(ValueError, match='runs of 2000 pixels'): rle_polygons(text, 41, 50)

def in_every_format(top):
    "One square and one box on one film, as each tool writes them"
    (x0, y0), (x1, y1) = (4, 6), (24, 26)
    square, box = [[x0, y0], [x1, y0], [x1, y1], [x0, y1]], [30, 10, 15, 20]
    coco = {'images': [{'id': 1, 'file_name': 'a.png', 'height': 40, 'width': 50}], 'categories': [{'id': 3, 'name': 'fx'}, {'id': 4, 'name': 'fluid'}],
            'annotations': [{'id': 1, 'image_id': 1, 'category_id': 3, 'segmentation': [sum(square, [])], 'bbox': [4, 6, 20, 20]}, {'id': 2, 'image_id': 1, 'category_id': 4, 'segmentation': [], 'bbox': box}]}
    labelme = {'version': '5.4.1', 'imagePath': 'a.png', 'imageData': 'AAAA', 'imageHeight': 40, 'imageWidth': 50, 'shapes': [
        {'label': 'fx', 'points': square, 'shape_type': 'polygon', 'group_id': None}, {'label': 'fluid', 'points': [[45, 10], [30, 30]], 'shape_type': 'rectangle'}]}
    regions = [{'shape_attributes': {'name': 'polygon', 'all_points_x': [p[0] for p in square], 'all_points_y': [p[1] for p in square]}, 'region_attributes': {'type': 'fx'}},
               {'shape_attributes': dict(zip(('x', 'y', 'width', 'height'), box), name='rect'), 'region_attributes': {'type': 'fluid'}}]
    notes = {'coco': coco, 'labelme': labelme, 'via1': {'a.png9': {'filename': 'a.png', 'size': 9, 'regions': {str(i): r for i,r in enumerate(regions)}}},
             'via2': {'_via_settings': {}, '_via_img_metadata': {'a.png9': {'filename': 'a.png', 'size': 9, 'regions': regions}}}}
    for name,note in notes.items(): (top/f'{name}.json').write_text(json.dumps(note))
    (top/'yolo').mkdir()
    (top/'yolo'/'a.txt').write_text('0 '+' '.join(f'{v/s}' for p in square for v,s in zip(p, (50, 40)))+'\n1 .75 .5 .3 .5\n')
    (top/'yolo'/'classes.txt').write_text('fx\nfluid\n')
    (top/'rle.json').write_text(json.dumps(coco | {'annotations': [
        {'image_id': 1, 'category_id': 3, 'segmentation': {'size': [40, 50], 'counts': [4*40+6]+[20, 20]*19+[20, 50*40-4*40-6-20*19-20*20]}},
        {'image_id': 1, 'category_id': 4, 'segmentation': {'size': [40, 50], 'counts': packed([30*40+10]+[20, 20]*14+[20, 50*40-30*40-10-20*14-20*15])}}]}))
    return [top/n for n in ('coco.json', 'rle.json', 'labelme.json', 'via1.json', 'via2.json', 'yolo')]

def test_every_format_gives_the_same_masks(tmp_path):
    write_png(tmp_path/'a.png', flat())
    means = {'fx': 'supracondylar fracture', 'fluid': 'joint effusion'}
    for path in in_every_format(tmp_path):
        rows = rasterize_masks(read_shapes(path, tmp_path), means, tmp_path)
        assert rows.values.tolist()==[['a.png', p, f'masks/{pair_name("a", p)}.png'] for p in ('supracondylar fracture', 'joint effusion')], path
        drawn = [cv2.imread(str(tmp_path/m), 0)>0 for m in rows['mask']]
        assert [m.sum() for m in drawn]==[400, 300] and drawn[0][6:26, 4:24].all() and drawn[1][10:30, 30:45].all(), path
        one = rasterize_masks(read_shapes(path, tmp_path), dict.fromkeys(means, 'joint effusion'), tmp_path)
        assert len(one)==1 and (cv2.imread(str(tmp_path/one['mask'][0]), 0)>0).sum()==700        # one mask per film and pathology
    films = pd.DataFrame([['a.png', 'P1', 'LAT', 'L', '']], columns=data.COLUMNS)
    write_manifest(tmp_path, merge_masks(films, rasterize_masks(read_shapes(tmp_path/'coco.json', tmp_path), means, tmp_path)))
    assert read_labels(tmp_path).pathology.tolist()==list(means.values())

def test_what_is_wrong_with_annotations_is_said_at_once(tmp_path):
    write_png(tmp_path/'films'/'a.png', flat()); write_png(tmp_path/'b.png', flat())
    shape = lambda file, label, box, h=0, w=0: dict(file=file, label=label, polygons=[box_polygon(*box)], height=h, width=w)
    shapes = [shape('a.png', 'fx', (1, 1, 5, 5)), shape('a.png', 'cast', (1, 1, 5, 5)), shape('a.png', 'fx', (40, 30, 20, 5)), shape('../b.png', 'fx', (1, 1, 5, 5)), shape('a.png', 'fx', (1, 1, 5, 5), 400, 500),
              shape('a.png', 'mole', (-90, 0, 5, 5)), shape(str(tmp_path/'b.png'), 'fx', (1, 1, 5, 5))]
    with pytest.raises(LabelsError) as e: rasterize_masks(shapes, {'fx': 'olecranon fracture', 'mole': '', 'x': 'nonsense'}, tmp_path/'films')
    for text in ("label 'cast' of 1 shape", "'nonsense', which is no class", 'leaves the film of 50 x 40', '../b.png: no such film', 'is (40, 50), while it was annotated as (400, 500)', '6 faults'):
        assert text in str(e.value), str(e.value)
    assert sorted(p.name for p in tmp_path.rglob('*'))==['a.png', 'b.png', 'films']             # nothing was written

@pytest.mark.parametrize('text', ['{', '[]', '3', '{"images": []}', '{"annotations": [], "images": []}', '{"shapes": []}'])
def test_files_that_are_no_annotations(tmp_path, text):
    (tmp_path/'x.json').write_text(text)
    for read in (read_coco, read_labelme, lambda p: read_shapes(p, tmp_path)):
        with pytest.raises(ValueError, match='x.json'): read(p := tmp_path/'x.json')

@pytest.mark.parametrize('polygons', [[], [np.array([[1., 1], [5, 5]])], [box_polygon(3, 3, 9, 0)], [np.array([[1, 1], [5, np.nan], [9, 2]])]])
def test_shapes_without_area_are_faults(tmp_path, polygons):
    write_png(tmp_path/'a.png', flat())
    with pytest.raises(LabelsError, match='a.png: a fx without any area'): rasterize_masks([dict(file='a.png', label='fx', polygons=polygons, height=0, width=0)], {'fx': 'normal'}, tmp_path)

def test_yolo_boxes_and_polygons_mixed_and_empty(tmp_path):
    (tmp_path/'n.txt').write_text('')
    assert read_yolo(tmp_path/'n.txt', 10, 10)==[]
    for line in ('0 .1 .2 .3', '0 .1 .2 .3 .4 .5', 'fx .1 .2 .3 .4', '0 .1 .2 .3 .4 .5 .6 .7', '0 .1 .2 .3 x'):
        (tmp_path/'n.txt').write_text('0 .5 .5 .1 .1\n'+line)
        with pytest.raises(ValueError, match='n.txt, line 2'): read_yolo(tmp_path/'n.txt', 10, 10)

def test_a_mask_file_with_a_grey_for_each_class(tmp_path):
    labels = np.zeros((30, 40), np.uint8)
    labels[2:10, 3:20], labels[12:20, 5:9] = 1, 7
    write_png(tmp_path/'m.png', labels)
    shapes = masks.read_label_mask(tmp_path/'m.png', 'a.png', {1: 'fx', 7: 'fluid'})
    assert [(s['label'], (polygon_mask(s['polygons'], 30, 40)==(labels==g)).all()) for s,g in zip(shapes, (1, 7))]==[('fx', True), ('fluid', True)]
    cv2.imwrite(str(tmp_path/'m.jpg'), labels*30)
    with pytest.raises(ValueError, match='greys, too many for classes'): masks.read_label_mask(tmp_path/'m.jpg', 'a.png')

def test_the_size_of_a_film_is_that_of_its_pixels(tmp_path):
    "Cameras note how a picture is to be turned; size and pixels must agree on it"
    from PIL import Image
    for name in ('plain.png', 'turned.jpg', 'turned.png', 'deep.tif'):
        exif = Image.Exif()
        if 'turned' in name: exif[274] = 6
        Image.fromarray(np.zeros((30, 40), np.uint16 if 'deep' in name else np.uint8)).save(tmp_path/name, exif=exif)
        assert data.image_shape(tmp_path/name)==data.read_image(tmp_path/name).shape[:2]==((40, 30) if 'turned' in name else (30, 40)), name
    (tmp_path/'x.png').write_bytes(b'no picture')
    assert data.image_shape(tmp_path/'x.png') is None

# --------------------------------------------------------------------------------------------------------------- checking of masks

@pytest.fixture(scope='module')
def arm(): return phantom('LAT', ['supracondylar fracture'], side='L', age=30, seed=5, size=192)

def bad_masks(arm):
    m = arm.masks['supracondylar fracture']
    return {'good': m, 'wrong polarity': ~m, 'empty': m & False, 'full': m | True, 'other size': m[:100, :100], 'duplicate': m, 'outside the film': None, 'missing': None, 'unreadable': m}

def with_bad_masks(top, arm):
    rows = []
    for i,(name,m) in enumerate(bad_masks(arm).items()):
        film = np.roll(arm.image, i, 1)
        if name=='outside the film': film = np.pad(arm.image, ((0, 0), (80, 0))); m = np.zeros(film.shape, bool); m[20:150, 5:70] = True
        write_png(top/f'{name}.png', film)
        if name!='missing': write_png(top/'m'/f'{name}.png', m.astype(np.uint8)*255)
        if name=='unreadable': (top/'m'/f'{name}.png').write_bytes(b'PNG?')
        rows.append(f'{name}.png,P{i},LAT,L,supracondylar fracture,m/{name}.png')
    (top/'labels.csv').write_text('\n'.join(['file,patient,view,side,pathology,mask', *rows]))
    return top

def test_each_fault_of_a_mask_is_found(tmp_path, arm):
    found = check_masks(with_bad_masks(tmp_path, arm))
    assert dict(zip(found.pair, found.fault))=={pair_name(f, 'supracondylar fracture'): f for f in bad_masks(arm) if f!='good'}
    assert list(found)==['pair', 'fault', 'do'] and (found.do!='').all() and 'good__supra' in found.do[found.fault=='duplicate'].item()

@pytest.mark.parametrize('invert', [False, True])
@pytest.mark.parametrize('deep', [False, True])
def test_the_film_may_be_inverted_or_deep(tmp_path, arm, invert, deep):
    film = (arm.image.astype(np.uint16)*16 if deep else arm.image)
    film = film.max()-film if invert else film
    for fault,m in bad_masks(arm).items():
        if fault in ('wrong polarity', 'empty', 'full', 'good'): assert masks.mask_error(m, film)==('' if fault=='good' else fault)

def test_inverted_masks_of_all_regions_are_told_from_upright_ones():
    "Also on films with every nuisance: no false alarm, and hardly one that is missed"
    for i,p in enumerate(PATHOLOGIES*2):
        a = phantom(VIEWS[i//14], [p], side='LR'[i%2], age=30, seed=i, size=160)
        assert (masks.mask_error(a.masks[p], a.image), masks.mask_error(~a.masks[p], a.image))==('', 'wrong polarity'), (p, i)
    hostile = [(phantom(VIEWS[i%2], [PATHOLOGIES[i%14]], age=30, seed=i, size=128, artifacts=sample_artifacts(i)), PATHOLOGIES[i%14]) for i in range(56)]
    assert [masks.mask_error(a.masks[p], a.image) for a,p in hostile]==['']*len(hostile)
    assert sum(masks.mask_error(~a.masks[p], a.image)=='wrong polarity' for a,p in hostile)>=.95*len(hostile)

def test_faults_of_the_stage_are_found(tmp_path, arm):
    write_png(tmp_path/'in'/'a.png', arm.image); write_png(tmp_path/'in'/'b.png', np.roll(arm.image, 9, 1))
    write_png(tmp_path/'in'/'m.png', (~arm.masks['supracondylar fracture']).astype(np.uint8)*255)
    (tmp_path/'in'/'labels.csv').write_text('file,patient,view,side,pathology,mask,group,licence\na.png,1,LAT,L,supracondylar fracture,m.png,g,CC0\na.png,1,LAT,L,joint effusion,,g,CC0\nb.png,2,LAT,R,normal,,,\n')
    preprocess_folder(tmp_path/'in', tmp_path/'images', 160)
    table = write_masks(tmp_path/'in', tmp_path/'images', tmp_path/'masks')
    found = check_masks(tmp_path/'masks', tmp_path/'images')
    assert found[['pair', 'fault']].values.tolist()==[['a__supracondylar_fracture', 'wrong polarity']]
    (tmp_path/'masks'/'b__normal.png').unlink()
    (tmp_path/'masks'/'a__joint_effusion.png').write_bytes((tmp_path/'masks'/'a__supracondylar_fracture.png').read_bytes())
    assert check_masks(tmp_path/'masks', tmp_path/'images').fault.tolist()==['wrong polarity', 'wrong polarity', 'missing']
    masks.plot_mask_checks(tmp_path/'masks', check_masks(tmp_path/'masks', tmp_path/'images'), tmp_path/'images').savefig(tmp_path/'sheet.png')
    assert list(table)[-2:]==['licence', 'group'] and table.licence.tolist()==['CC0', 'CC0', ''] and table.group.tolist()==['g', 'g', '']
    sets = write_split(tmp_path/'masks', tmp_path/'split')
    assert list(sets)[-3:]==['licence', 'group', 'split'] and (read_pairs(tmp_path/'split').licence==table.licence).all()

# ------------------------------------------------------------------------------------------------------------------ suggested masks

def test_suggested_masks_pass_the_check_and_have_the_papers_area(tmp_path):
    rows = ['file,patient,view,side,pathology']
    want = {p: max(1, round(sum(c)/150)) for p,c in TABLE3.items()}
    for i,p in enumerate(q for q,n in want.items() for _ in range(n)):
        for v in VIEWS:
            write_png(tmp_path/'in'/f'{i}{v}.png', phantom(v, [p], side='LR'[i%2], age=30, seed=i, size=160).image)
            rows += [f'{i}{v}.png,P{i},{v},{"LR"[i%2]},{p}']
            if p=='supracondylar fracture': rows += [f'{i}{v}.png,P{i},{v},{"LR"[i%2]},joint effusion']
    (tmp_path/'in'/'labels.csv').write_text('\n'.join(rows))
    preprocess_folder(tmp_path/'in', tmp_path/'images', 160)
    table = write_masks(tmp_path/'in', tmp_path/'images', tmp_path/'masks')
    assert (table.mask_source=='suggested').all() and len(check_masks(tmp_path/'masks', tmp_path/'images'))==0
    weight = table.pathology.map({p: sum(c) for p,c in TABLE3.items()})/table.groupby('pathology').pathology.transform('size')
    assert .25<np.average(table.area, weights=weight)<.33, np.average(table.area, weights=weight)
    assert table.area.between(.12, .7).all()
    before = {p.name: p.read_bytes() for p in (tmp_path/'masks').glob('*.png')}
    write_masks(tmp_path/'in', tmp_path/'images', tmp_path/'masks')
    assert before=={p.name: p.read_bytes() for p in (tmp_path/'masks').glob('*.png')}
    assert 'all' in mask_area_table(table).index and mask_area_table(table).paper.iloc[-1]=='0.289'

def test_suggestions_follow_the_film():
    "Nearer to the joint than the middle of the film is, and along the bones"
    near, middle = [], []
    for i in range(30):
        a = phantom('LAT', ['normal'], side='LR'[i%2], age=30, seed=i, size=160)
        at = np.array(a.landmarks['capitellum'])/160
        near.append(np.hypot(*(estimate_joint(a.image)-at))); middle.append(np.hypot(*(at-.5)))
        up, out = estimate_limb_axes(a.image, estimate_joint(a.image))
        assert up[1]<-.5 and up@out<.51
    assert np.mean(near)<.6*np.mean(middle) and np.median(near)<.1

def test_normal_films_take_all_regions_evenly_in_each_view():
    pairs = pd.DataFrame({'pathology': (['normal']*2+['joint effusion'])*40, 'view': ['AP', 'LAT', 'AP']*40})
    pairs['region'] = mask_regions(pairs)
    assert pairs[pairs.pathology=='normal'].groupby(['view', 'region']).size().tolist()==[10]*8
    assert (pairs.region[pairs.pathology!='normal']=='joint').all()

def test_no_two_suggestions_of_a_film_are_alike(arm):
    drawn = [heuristic_mask(arm.image, 'joint', pair_name('x', p)) for p in REGIONS['joint']]
    assert all((a!=b).mean()>.005 for i,a in enumerate(drawn) for b in drawn[:i])

# ------------------------------------------------------------------------------------------------------------------------ the split

def like_the_paper(seed, alike=False):
    "2,783 films and 3,017 pairs with the counts of Table 3, of patients with one to four films; alike: a patient's films show much the same"
    rng = np.random.default_rng(seed)
    names = rng.permutation(np.repeat(PATHOLOGIES, np.sum(list(TABLE3.values()), 1)))
    films, hurt = [[p] for p in names[names=='normal']], names[names!='normal']
    first = 2783-len(films)
    others = [[p] for p in hurt[:first]]
    for p in hurt[first:]:
        while True:
            f = others[rng.integers(first)]
            if p not in f: f.append(p); break
    films += others
    films = sorted(films) if alike else [films[i] for i in rng.permutation(len(films))]
    patient = np.repeat(np.arange(2783), rng.integers(1, 5, 2783))
    return pd.DataFrame([(f'f{i:04d}', f'P{patient[i]:04d}', VIEWS[i%2], p) for i,f in enumerate(films) for p in f], columns=['image', 'patient', 'view', 'pathology'])

@pytest.mark.parametrize('alike', [False, True])
@pytest.mark.parametrize('seed', range(3))
def test_the_papers_distribution_is_split_as_in_the_paper(seed, alike):
    pairs, before = like_the_paper(seed, alike), time.process_time()
    pairs['split'] = stratified_group_split(pairs, seed=seed)
    assert time.process_time()-before<2
    count = class_counts(pairs)
    n = count.train+count.test
    assert n['total']==3017 and pairs.image.nunique()==2783
    assert ((count.test-.3*n).abs()<=np.maximum(1, .02*n)).iloc[:-1].all() and len(split_deviations(pairs))==0
    assert abs(count.test['total']/898-1)<=.01 and abs(count.train['total']/2119-1)<=.01
    assert (pairs.groupby('patient').split.nunique()==1).all() and (pairs.groupby('image').split.nunique()==1).all()
    views = view_counts(pairs)
    assert (views[['AP test', 'LAT test']].loc['total']>.28*3017/2).all()

def test_no_random_grouped_split_is_nearer():
    pairs, rng = like_the_paper(9), np.random.default_rng(0)
    n = pairs.pathology.value_counts()
    off = lambda test: ((pairs.pathology[test].value_counts().reindex(n.index, fill_value=0)-.3*n)/n).abs()
    mine = off(stratified_group_split(pairs)=='test')
    sizes = pairs.groupby('patient').size()
    for _ in range(100):
        order = sizes.iloc[rng.permutation(len(sizes))]
        random = off(pairs.patient.isin(order.index[order.cumsum()<=.3*len(pairs)]))
        assert mine.mean()<random.mean() and mine.max()<=random.max()

def test_no_stratified_folds_are_nearer():
    from sklearn.model_selection import StratifiedGroupKFold
    folds = StratifiedGroupKFold(10, shuffle=True, random_state=0)
    pairs = like_the_paper(9)
    n = pairs.pathology.value_counts()
    off = lambda test: ((pairs.pathology[test].value_counts().reindex(n.index, fill_value=0)-.3*n)/n).abs().mean()
    held = np.concatenate([t for _,t in list(folds.split(pairs, pairs.pathology, pairs.patient))[:3]])
    assert off(stratified_group_split(pairs)=='test')<=off(np.isin(np.arange(len(pairs)), held))

manifests = st.lists(st.tuples(st.integers(0, 12), st.integers(0, 25), st.sampled_from(['', '', '', 'x', 'y']), st.sampled_from(PATHOLOGIES), st.sampled_from(VIEWS)), min_size=1, max_size=60)

def families(pairs):
    "Which rows hang together, by walking from row to row"
    home = list(range(len(pairs)))
    def top(i):
        while home[i]!=i: i = home[i]
        return i
    for k in ('patient', 'image', 'group'):
        seen = {}
        for i,v in enumerate(pairs[k]):
            if v=='': continue
            home[top(i)] = top(seen.setdefault(v, i))
    return [top(i) for i in range(len(pairs))]

@settings(deadline=None, max_examples=50)
@given(manifests, st.integers(0, 5), st.sampled_from([.1, .3, .5]))
def test_any_manifest_is_split_without_leaks(rows, seed, fraction):
    pairs = pd.DataFrame(rows, columns=['patient', 'image', 'group', 'pathology', 'view'])
    home = pd.Series(families(pairs), index=pairs.index)
    if home.nunique()==1:
        with pytest.raises(ValueError, match='cannot split'): stratified_group_split(pairs, fraction, seed)
        return
    part = stratified_group_split(pairs, fraction, seed)
    assert set(part)=={'train', 'test'} and len(part)==len(pairs) and part.name=='split'
    for k in ('patient', 'image'): assert (part.groupby(pairs[k]).nunique()==1).all()
    assert (part.groupby(home).nunique()==1).all() and (patient_groups(pairs).groupby(home).nunique()==1).all() and patient_groups(pairs).nunique()==home.nunique()
    assert part.equals(stratified_group_split(pairs, fraction, seed))                                          # always the same
    mixed = pairs.sample(frac=1, random_state=seed)
    assert stratified_group_split(mixed, fraction, seed).sort_index().equals(part)                             # whatever the order of the rows
    missed = split_deviations(pairs.assign(split=part), fraction)
    assert set(missed.pathology)<=set(pairs.pathology) and (missed.why!='').all()

@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 6), min_size=2, max_size=9))
def test_a_single_class_comes_as_near_as_its_patients_allow(sizes):
    "Among all choices of patients, tried one by one, none is nearer"
    pairs = pd.DataFrame({'patient': np.repeat(np.arange(len(sizes)), sizes), 'pathology': 'joint effusion'})
    got = (stratified_group_split(pairs)=='test').sum()
    sums = [sum(s for i,s in enumerate(sizes) if k>>i & 1) for k in range(1, 2**len(sizes)-1)]
    assert abs(got-.3*sum(sizes))<=min(abs(s-.3*sum(sizes)) for s in sums)+1e-9

def test_two_patients_one_patient_unknown_class():
    two = pd.DataFrame({'patient': ['a', 'a', 'b'], 'pathology': ['normal', 'joint effusion', 'normal']})
    assert sorted(set(stratified_group_split(two)))==['test', 'train']
    for bad in (two.head(2), two.head(0)):
        with pytest.raises(ValueError, match='cannot split'): stratified_group_split(bad)
    with pytest.raises(ValueError, match="unknown pathology 'sprain'"): stratified_group_split(two.assign(pathology='sprain'))

def test_classes_off_target_are_named_with_the_reason():
    lone = pd.DataFrame({'patient': ['a']*8+list('bcdefghijk'), 'pathology': ['joint effusion']*8+['normal']*10})
    missed = split_deviations(lone.assign(split=stratified_group_split(lone)))
    assert missed.pathology.tolist()==['joint effusion'] and missed.why[0]=='all its pairs are of one patient or group'
    lumps = pd.DataFrame({'patient': ['a']*30+['b']*30+list(range(20)), 'pathology': ['joint effusion']*60+['normal']*20}).astype(str)
    assert 'its 2 patients have 30, 30 pairs: 30 is the nearest' in split_deviations(lumps.assign(split=stratified_group_split(lumps))).why.tolist()

def test_table_3_and_small_classes():
    pairs = like_the_paper(1)
    pairs['split'] = stratified_group_split(pairs)
    shares = format_shares(class_counts(pairs))
    assert shares.loc['supracondylar fracture', 'paper train']=='609 (28.74%)' and shares.loc['normal', 'paper test']=='194 (21.60%)' and shares.loc['total', 'paper train']=='2119'
    assert (view_counts(pairs).sum(axis=1)==class_counts(pairs)[['train', 'test']].sum(axis=1)).all()
    few = pairs[(pairs.pathology!='radial head fracture') | (pairs.groupby('pathology').cumcount()<4)]
    small = small_classes(few)
    assert {'radial head fracture'}<=set(small.pathology)<={'radial head fracture', 'elbow dislocation anterior'} and (small.train<5).all() and small.then.str.contains('WGAN-GP').all()

def test_regions_are_those_of_the_paper():
    assert {p: region_of(p) for p in ('joint effusion', 'supracondylar fracture', 'proximal radial fracture', 'soft tissue swelling', 'normal')}=={
        'joint effusion': 'joint', 'supracondylar fracture': 'humerus', 'proximal radial fracture': 'forearm', 'soft tissue swelling': 'whole arm', 'normal': None}

"Made copies of public data sets in their published layout, imported with the definitions that come with the package"
import csv, json, subprocess, sys
from pathlib import Path
import cv2, numpy as np, pandas as pd, pytest, yaml
from conftest import ROOT
from elbowsynth.data.images import read_image, write_png
from elbowsynth.data.import_cli import IMPORTERS
from elbowsynth.data.labels import read_labels
from elbowsynth.study import load_study, read_study, study_names

RNG = np.random.default_rng(0)

def pixels(height=120, width=100): return cv2.resize(RNG.integers(20, 200, (12, 10), dtype=np.uint8), (width, height), interpolation=cv2.INTER_CUBIC)

def import_set(importer, source, out, *options):
    "As a user would; the labels as the study reads them"
    command = [sys.executable, '-m', 'elbowsynth.data.import_cli', importer, str(source), str(out), *map(str, options)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode==0, done.stderr
    return pd.read_csv(out/'labels.csv', dtype=str, keep_default_na=False), done.stdout

def failed_import(*command):
    done = subprocess.run([sys.executable, '-m', 'elbowsynth.data.import_cli', *map(str, command)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode and 'Traceback' not in done.stderr
    return done.stderr

def test_each_definition_of_a_set_names_an_importer_and_what_was_tried():
    sets = {name: load_study(name).dataset for name in study_names() if load_study(name).dataset}
    assert {n.split('-')[0] for n in sets}=={'mura', 'fracatlas', 'grazpedwri', 'chestxray14'} and len(sets)==13
    for name, dataset in sets.items():
        assert dataset['importer'] in IMPORTERS and dataset['tried_on'] and dataset['citation'], name
        assert dataset['redistribution'] is (not name.startswith('mura'))

# ---- MURA

def write_mura(folder):
    "Two regions; a patient with two studies, a study with three images"
    rows = []
    studies = [('train', 'XR_WRIST', 'patient00001', 'study1_positive', 3), ('train', 'XR_WRIST', 'patient00001', 'study2_negative', 1),
               ('train', 'XR_WRIST', 'patient00002', 'study1_negative', 2), ('valid', 'XR_WRIST', 'patient11185', 'study1_positive', 1),
               ('train', 'XR_ELBOW', 'patient00011', 'study1_negative', 1)]
    for subset, region, patient, study, n in studies:
        path = f'MURA-v1.1/{subset}/{region}/{patient}/{study}'
        for i in range(n): write_png(folder/path/f'image{i+1}.png', pixels())
        rows.append(f'{path}/,{int(study.endswith("positive"))}')
    for subset in ('train', 'valid'):
        (folder/'MURA-v1.1'/f'{subset}_labeled_studies.csv').write_text('\n'.join(r for r in rows if f'/{subset}/' in r)+'\n')
    return folder/'MURA-v1.1'

def test_mura_wrists(tmp_path):
    labels, printed = import_set('mura', write_mura(tmp_path), tmp_path/'out', '--study', 'mura-wrist')
    assert labels.pathology.value_counts().to_dict()=={'abnormal': 4, 'normal': 3} and labels.patient.nunique()==3
    assert (labels[labels.patient=='patient00001'].pathology=='abnormal').sum()==3      # two visits, one patient
    assert 'no redistribution' in labels.license[0] and 'images of other parts of the body, not imported: 1' in printed
    study = read_study(tmp_path/'out')
    assert study.name=='mura-wrist'
    table = read_labels(tmp_path/'out', study=study)
    assert (table['view']=='XR').all() and (table.side=='').all()                       # the only view there is

def test_mura_without_the_region_of_the_definition(tmp_path):
    assert 'has no train/XR_HAND or valid/XR_HAND' in failed_import('mura', write_mura(tmp_path), tmp_path/'out', '--study', 'mura-hand')

# ---- FracAtlas

FRACATLAS_COLUMNS = ('image_id,hand,leg,hip,shoulder,mixed,hardware,multiscan,fractured,fracture_count,frontal,lateral,oblique').split(',')

def write_fracatlas(folder):
    rows = [('IMG0000001.jpg', dict(hand=1, fractured=1, fracture_count=1, frontal=1)), ('IMG0000002.jpg', dict(hand=1, oblique=1)),
            ('IMG0000003.jpg', dict(leg=1, lateral=1)), ('IMG0000004.jpg', dict(hand=1, hardware=1, lateral=1)),
            ('IMG0000005.jpg', dict(hand=1, multiscan=1, frontal=1, lateral=1)), ('IMG0000006.jpg', dict(hand=1, leg=1, mixed=1, frontal=1))]
    with_outline = []
    for name, flags in rows:
        kind = 'Fractured' if flags.get('fractured') else 'Non_fractured'
        path = folder/'images'/kind/name
        path.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(path), pixels())
    table = [','.join(FRACATLAS_COLUMNS)]+[','.join([name, *[str(flags.get(c, 0)) for c in FRACATLAS_COLUMNS[1:]]]) for name, flags in rows]
    (folder/'dataset.csv').write_text('\n'.join(table))
    coco = {'images': [{'id': 1, 'file_name': 'IMG0000001.jpg', 'height': 120, 'width': 100}], 'categories': [{'id': 1, 'name': 'fractured'}],
            'annotations': [{'id': 1, 'image_id': 1, 'category_id': 1, 'segmentation': [[10, 20, 50, 20, 50, 40, 10, 40]], 'bbox': [10, 20, 40, 20], 'area': 800}]}
    path = folder/'Annotations'/'COCO JSON'/'COCO_fracture_masks.json'
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(coco))
    return folder

def test_fracatlas_hands(tmp_path):
    labels, _ = import_set('fracatlas', write_fracatlas(tmp_path/'FracAtlas'), tmp_path/'out', '--study', 'fracatlas-hand')
    by_source = labels.sort_values('file').reset_index(drop=True)
    assert by_source[['view', 'pathology']].values.tolist()==[['AP', 'fracture'], ['OBL', 'normal']]                     # not the leg
    rejects = pd.read_csv(tmp_path/'out'/'rejects.csv').set_index('file').reason.to_dict()
    assert {Path(f).stem[-1]: r for f, r in rejects.items()}=={'4': 'hardware without a fracture', '5': 'several views in one image', '6': 'several body parts in one image'}
    mask = read_image(tmp_path/'out'/by_source['mask'][0])
    assert abs((mask>127).sum()-40*20)<=60

# ---- GRAZPEDWRI-DX

CLASS_NAMES = ['boneanomaly', 'bonelesion', 'foreignbody', 'fracture', 'metal', 'periostealreaction', 'pronatorsign', 'softtissue', 'text']

def write_graz(folder):
    "Boxes in YOLO's format beside 16-bit images; every image has the box of the lead letter"
    rows, header = [], 'filestem,patient_id,study_number,timehash,gender,age,laterality,projection,initial_exam,ao_classification,cast,fracture_visible,metal'
    images = [('0001_1297860395_01_WRI-L1_M014', 1, 'L', 1, [(3, .5, .5, .4, .2), (3, .6, .5, .4, .2), (8, .1, .1, .05, .05)]),
              ('0001_1297860395_01_WRI-L2_M014', 1, 'L', 2, [(8, .1, .1, .05, .05)]),
              ('0003_0667332344_01_WRI-R3_F011', 3, 'R', 3, [(7, .5, .5, .5, .5), (4, .3, .3, .1, .1)]),
              ('0004_0667332344_01_WRI-R2_F011', 4, 'R', 2, [(8, .1, .1, .05, .05)])]             # fractured, not seen in this projection
    for k, (stem, patient, side, projection, boxes) in enumerate(images):
        write_png(folder/f'images_part{k+1}'/f'{stem}.png', pixels(200, 100).astype(np.uint16)*300)
        path = folder/'yolov5'/'labels'/f'{stem}.txt'
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text('\n'.join(' '.join(map(str, b)) for b in boxes))
        ao_class = '23r-M/2.1' if k in (0, 3) else ''
        rows.append(f'{stem},{patient},1,1,M,14,{side},{projection},1,{ao_class},,{int(k==0) or ""},')
    (folder/'dataset.csv').write_text('\n'.join([header, *rows]))
    (folder/'yolov5'/'meta.yaml').write_text(yaml.safe_dump({'names': CLASS_NAMES, 'nc': 9}))
    return folder

@pytest.mark.parametrize('boxes', ['box', 'ellipse'])
def test_grazpedwri(tmp_path, boxes):
    labels, _ = import_set('grazpedwri', write_graz(tmp_path/'graz'), tmp_path/'out', '--study', 'grazpedwri', '--boxes', boxes)
    rows = labels.sort_values(['file', 'pathology'])[['patient', 'view', 'side', 'pathology']].values.tolist()
    assert rows==[['1', 'AP', 'L', 'fracture'], ['1', 'LAT', 'L', 'normal'], ['3', 'OBL', 'R', 'metal'], ['3', 'OBL', 'R', 'soft tissue swelling']]
    rejects = pd.read_csv(tmp_path/'out'/'rejects.csv')
    assert rejects.reason.tolist()==['fractured according to the table, but without a box'] and '0004_' in rejects.file[0]
    mask = read_image(tmp_path/'out'/labels[labels.pathology=='fracture']['mask'].iloc[0])>127
    union = 50*40                                                   # columns 30 to 80 of 100, rows 80 to 120 of 200
    if boxes=='box': assert abs(mask.sum()-union)<=100 and mask[82:118, 32:78].all()
    else: assert .6*union<mask.sum()<.95*union and not mask[:79].any() and not mask[:, 82:].any()
    assert (labels.license=='CC BY 4.0').all() and read_labels(tmp_path/'out', study=read_study(tmp_path/'out')).pathology.notna().all()

# ---- ChestX-ray14

def write_chests(folder):
    entries = [('00000001_000.png', 'Cardiomegaly|Effusion', 1, 'PA'), ('00000001_001.png', 'Cardiomegaly', 1, 'PA'), ('00000005_000.png', 'No Finding', 5, 'PA'),
               ('00000006_000.png', 'No Finding', 6, 'AP'), ('00000007_000.png', 'No Finding', 7, 'PA'), ('00000008_000.png', 'No Finding', 8, 'PA'), ('00000009_000.png', 'Infiltration', 9, 'AP')]
    for k, (name, *_) in enumerate(entries): write_png(folder/f'images_{1+k//4:03d}'/'images'/name, pixels(128, 128))
    with (folder/'Data_Entry_2017.csv').open('w', newline='') as f:
        w = csv.writer(f)
        w.writerow(['Image Index', 'Finding Labels', 'Follow-up #', 'Patient ID', 'Patient Age', 'Patient Gender', 'View Position', 'OriginalImage[Width', 'Height]', 'OriginalImagePixelSpacing[x', 'y]', ''])
        for name, findings, patient, view in entries: w.writerow([name, findings, 0, patient, 58, 'M', view, 128, 128, .1, .1, ''])
    boxes = ['00000001_000.png,Cardiomegaly,20,30.5,60,40,,,', '00000001_000.png,Effusion,5,90,20,20,,,', '00000009_000.png,Infiltrate,10,10,30,30,,,']
    (folder/'BBox_List_2017.csv').write_text('\n'.join(['Image Index,Finding Label,Bbox [x,y,w,h],,,', *boxes]))
    return folder

def test_chests(tmp_path):
    "Boxes of two findings make two pairs; one normal image for each image with boxes, by view"
    labels, _ = import_set('chestxray14', write_chests(tmp_path/'nih'), tmp_path/'out', '--study', 'chestxray14')
    rows = sorted(labels[['file', 'patient', 'view', 'pathology']].values.tolist())
    assert rows==[['00000001_000.png', '1', 'PA', 'cardiomegaly'], ['00000001_000.png', '1', 'PA', 'effusion'], ['00000005_000.png', '5', 'PA', 'no finding'],
                  ['00000006_000.png', '6', 'AP', 'no finding'], ['00000009_000.png', '9', 'AP', 'infiltration']]
    mask = read_image(tmp_path/'out'/labels[labels.pathology=='cardiomegaly']['mask'].iloc[0])
    assert abs((mask>127).sum()-60*40)<=110

def test_a_faulty_box_is_named_with_its_line(tmp_path):
    folder = write_chests(tmp_path/'nih')
    with (folder/'BBox_List_2017.csv').open('a') as f: f.write('\n00000009_000.png,Mass,1,2,wide,3,,,')
    assert 'BBox_List_2017.csv, line 5: expected image, finding, x, y, w, h' in failed_import('chestxray14', folder, tmp_path/'out', '--study', 'chestxray14')
    assert not (tmp_path/'out'/'labels.csv').exists()

def test_a_definition_with_other_classes_is_refused(tmp_path):
    message = failed_import('chestxray14', write_chests(tmp_path/'nih'), tmp_path/'out', '--study', 'mura-wrist')
    assert '4 labels without a mapping' in message and 'fix: map each to one of the 2 classes' in message

def test_results_of_a_set_that_must_not_be_shared_are_not_collected(tmp_path):
    run = tmp_path/'run'
    (run/'split').mkdir(parents=True)
    (run/'split'/'study.yaml').write_text((ROOT/'elbowsynth'/'studies'/'mura-wrist.yaml').read_text())
    done = subprocess.run([sys.executable, '-m', 'elbowsynth.site', '--collect', str(run)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode and 'Traceback' not in done.stderr and 'must not be handed on (dataset.redistribution in the definition)' in done.stderr

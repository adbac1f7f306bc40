"Study definitions: faults, the paper's study, and studies of other joints from images to the report"
import ast, json, re, subprocess, sys
import jsonschema, pandas as pd, pytest, yaml
from conftest import ROOT, copy_of_checkout, sh
from elbowsynth.data.classes import caption
from elbowsynth.data.images import write_png
from elbowsynth.data.labels import LabelsError, read_labels
from elbowsynth.data.preprocess import preprocess_folder
from elbowsynth.paper import TABLE3
from elbowsynth.phantom.phantom import phantom
from elbowsynth.study import ELBOW, load_study, parse_study, read_study, study_names, study_path

WRIST = '''
name: wrist
title: Wrists of children
body_part: wrist
normal: no finding
classes:
  no finding: {}
  fracture: {region: forearm, aliases: [fx, distal radius fracture]}
  metal: {}
regions: [forearm]
views: {PA: {phrase: A frontal, aliases: [frontal, dorsopalmar]}}
caption: "{view} radiograph of a {body_part} with {classes}"
'''
TWO_CLASSES = '''
name: mura-toy
title: Two classes
body_part: shoulder
normal: normal
classes: {normal: {aliases: [negative]}, abnormal: {aliases: [positive]}}
views: {XR: {phrase: A}}
caption: "{view} radiograph of a {body_part}: {classes}"
'''

# ---- definitions

@pytest.mark.parametrize('name', study_names())
def test_shipped_definitions_are_valid(name):
    text = study_path(name).read_text()
    schema = json.loads((study_path(name).parent/'schema.json').read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(yaml.safe_load(text), schema)
    study = parse_study(text, name)
    assert study==load_study(name) and study.name==name
    assert 'yaml-language-server: $schema=schema.json' in text.splitlines()[0]

def test_the_study_of_the_paper():
    assert ELBOW.pathologies==list(TABLE3) and list(ELBOW.views)==['AP', 'LAT'] and ELBOW.sides==('L', 'R') and ELBOW.mirror=='R'
    assert {k: len(v) for k, v in ELBOW.label_fields.items()}=={'pathology': 14, 'view': 2, 'side': 2}          # Table 5: 18
    # the caption of Figure 1
    assert caption('LAT', ['soft tissue swelling', 'supracondylar fracture'])=='A lateral x-ray of an elbow displaying soft tissue swelling, supracondylar fracture'

def changed(text, old, new):
    assert old in text
    return text.replace(old, new)

FAULTS = [
    (changed(WRIST, 'title: Wrists of children\n', ''), 'file: title missing'),
    (changed(WRIST, 'body_part', 'bodypart'), 'file: unknown key bodypart'),
    (changed(WRIST, 'region: forearm,', 'region: foream,'), "classes.fracture.region: no region 'foream'; known: forearm"),
    (changed(WRIST, 'normal: no finding', 'normal: healthy'), "normal: no class 'healthy'"),
    (changed(WRIST, '  metal: {}', '  metal: {}\n  metal: {}'), 'metal occurs twice (line 10)'),
    (changed(WRIST, '  metal: {}', '  metal: {aliases: [FX]}'), "classes.metal: 'FX' already stands for fracture"),
    (changed(WRIST, '  metal: {}', '  Fracture: {}'), "classes.Fracture: 'Fracture' already stands for fracture"),
    (changed(WRIST, '  metal: {}', '  no: {}'), 'classes.False: this key is not text'),
    (changed(WRIST, '  metal: {}', '  ../../metal: {}'), "'../../metal' cannot be a name here"),
    (changed(WRIST, '  metal: {}', '  "<img>": {}'), "'<img>' cannot be a name here"),
    (changed(WRIST, 'PA: {phrase: A frontal,', 'PA/x: {phrase: A frontal,'), "'PA/x' cannot be a name here"),
    (changed(WRIST, '{phrase: A frontal, aliases', '{aliases'), 'views.PA: phrase missing'),
    (changed(WRIST, 'with {classes}', 'with {klass}'), 'unknown placeholder {klass}'),
    (changed(WRIST, 'with {classes}', 'with {classes'), 'caption: '),
    (WRIST+'mirror: R\n', "mirror: no side 'R'"),
    (WRIST+'gan_labels: [pathology, side]\n', 'gan_labels: side, but there are no sides'),
    (WRIST+'gan_labels: [age]\n', 'gan_labels.0: '),
    (WRIST+'minimum: {images: 0}\n', 'minimum.images: '),
    ('just text', 'expected keys and values'), ('a: [', 'expected YAML'), ('', 'expected keys and values')]

@pytest.mark.parametrize('text, message', FAULTS, ids=range(len(FAULTS)))
def test_faults_are_named(text, message):
    parse_study(WRIST)
    with pytest.raises(ValueError) as error: parse_study(text, 'mine.yaml')
    assert message in str(error.value) and str(error.value).startswith('mine.yaml: ')

def test_all_faults_are_in_one_report():
    text = changed(changed(WRIST, 'normal: no finding', 'normal: healthy'), 'region: forearm', 'region: hand')+'mirror: L\n'
    with pytest.raises(ValueError, match='mine.yaml: 3 errors'): parse_study(text, 'mine.yaml')

# ---- labels

def write_folder(folder, rows, definition=None):
    "Images of these rows (file, patient, view, pathology), and the definition beside them"
    for i, (file, *_) in enumerate(rows): write_png(folder/file, phantom(('AP', 'LAT')[i%2], ['normal'], age=30, seed=i, size=192).image)
    table = pd.DataFrame(rows, columns=['file', 'patient', 'view', 'pathology'])
    table.to_csv(folder/'labels.csv', index=False)
    if definition: (folder/'study.yaml').write_text(definition)
    return folder

def test_labels_in_the_words_of_the_definition(tmp_path, capsys):
    "Aliases in any spelling; a table without sides, and without a view where there is only one"
    rows = [('a.png', '1', 'Frontal', 'FX'), ('b.png', '2', '', 'No_Finding'), ('c.png', '3', 'dorsopalmar', 'distal radius  fracture')]
    table = read_labels(write_folder(tmp_path, rows), study=parse_study(WRIST))
    assert table.pathology.tolist()==['fracture', 'no finding', 'fracture'] and table['view'].tolist()==['PA']*3 and (table.side=='').all()
    assert 'no image of metal, of which nothing is trained' in capsys.readouterr().out

def test_labels_that_contradict_the_definition(tmp_path):
    rows = [('a.png', '1', 'LAT', 'fracture'), ('b.png', '2', 'PA', 'sprain'), ('c.png', '3', 'PA', 'metal')]
    demanding = parse_study(WRIST+'minimum: {images: 2}\n')
    with pytest.raises(LabelsError) as error: read_labels(write_folder(tmp_path, rows), study=demanding)
    for message in ("unknown view 'LAT'; known: PA", "unknown pathology 'sprain'; known: no finding, fracture, metal",
                    'metal: 1 images of 1 patients, the study wrist asks for 2 images of 1 patients'): assert message in str(error.value)

def test_images_of_one_study_are_not_continued_with_another(tmp_path):
    data = write_folder(tmp_path/'data', [('a.png', '1', 'PA', 'fracture'), ('b.png', '2', 'PA', 'no finding')], WRIST)
    preprocess_folder(data, tmp_path/'out', 64)
    assert read_study(tmp_path/'out')==parse_study(WRIST)
    before = {p: p.read_bytes() for p in (tmp_path/'out').iterdir()}
    with pytest.raises(ValueError, match='holds images of the study wrist; .*elbow.yaml has other name, classes, views, '): preprocess_folder(data, tmp_path/'out', 64, study='elbow')
    assert {p: p.read_bytes() for p in (tmp_path/'out').iterdir()}==before
    (data/'study.yaml').write_text(WRIST.replace('aliases: [fx,', 'aliases: [fx, break,'))       # a further alias changes no result
    preprocess_folder(data, tmp_path/'out', 64)

# ---- no class, view or side in the code

# Simulation, the paper's numbers, and importers, which know the words of files
OF_THE_ELBOW = {'phantom', 'paper', 'diffusion.pretraining', 'experiments.finetuning_effect'}
WORDS = {*ELBOW.classes, *ELBOW.views}-{'normal'}

def literals(path):
    "The texts in a module that are no docstrings"
    tree = ast.parse(path.read_text())
    docstrings = {id(n.body[0].value) for n in ast.walk(tree)
                  if isinstance(n, (ast.Module, ast.ClassDef, ast.FunctionDef)) and n.body and isinstance(n.body[0], ast.Expr)}
    return [n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str) and id(n) not in docstrings]

def test_no_class_and_no_view_in_the_code():
    found = {}
    for path in sorted((ROOT/'elbowsynth').rglob('*.py')):
        module = '.'.join(path.relative_to(ROOT/'elbowsynth').with_suffix('').parts)
        if module.split('.')[0] in OF_THE_ELBOW or module in OF_THE_ELBOW or path.name.startswith('_'): continue
        words = sorted({w for text in literals(path) for w in WORDS if re.search(rf'(?<![A-Za-z]){w}(?![A-Za-z])', text)})
        if words: found[module] = words
    assert found=={}

# ---- whole studies

SETTINGS = 'epochs=1 checkpoint_every=1 boost_epochs=0 n_trials=1 wgan_gp.max_models=2'

def write_archive(folder):
    "Forty images of twenty patients, a table in other words than the study's, and boxes of the fractures in COCO's format"
    rows, images, annotations = [], [], []
    for i in range(40):
        finding = ('No finding', 'fx', 'FX', 'metal')[i//2%4]
        name = f'w{i:02d}.png'
        write_png(folder/'images'/name, phantom(('AP', 'LAT')[i%2], ['normal'], age=9, seed=i, size=192).image)
        images.append({'id': i, 'file_name': name, 'width': 192, 'height': 192})
        if finding in ('fx', 'FX'): annotations.append({'id': i, 'image_id': i, 'category_id': 1, 'bbox': [70, 80, 50, 40]})
        rows.append((name, f'p{i//2}', finding))
    pd.DataFrame(rows, columns=['Filename', 'Subject ID', 'Diagnosis']).to_csv(folder/'table.csv', index=False)
    (folder/'boxes.json').write_text(json.dumps({'images': images, 'annotations': annotations, 'categories': [{'id': 1, 'name': 'fx'}]}))
    (folder/'wrist.yaml').write_text(WRIST)
    return folder

def import_wrists(top, archive, out):
    "The second step of the page Use your own radiographs"
    return sh(sys.executable, '-m', 'elbowsynth.data.import_cli', 'folder', archive, out, '--study', archive/'wrist.yaml', '--annotations', archive/'boxes.json',
              cwd=top, PYTHONPATH=str(top))

def toy_shoulders(folder):
    rows = []
    for i in range(40):
        write_png(folder/f's{i:02d}.png', phantom(('AP', 'LAT')[i%2], ['normal'], age=40, seed=i, size=192).image)
        rows.append((f's{i:02d}.png', f'p{i//2}', ('negative', 'positive')[i//2%2]))
    pd.DataFrame(rows, columns=['file', 'patient', 'pathology']).to_csv(folder/'labels.csv', index=False)
    (folder.parent/'two.yaml').write_text(TWO_CLASSES)
    return folder

def study(top, *args, check=True): return sh(sys.executable, '-m', 'elbowsynth.run', 'study', '--profile', 'smoke', *args, cwd=top, check=check, PYTHONPATH=str(top))

@pytest.fixture(scope='module')
def top(tmp_path_factory): return copy_of_checkout(tmp_path_factory.mktemp('clone'))

@pytest.mark.long('a study to its report, a minute')
def test_a_study_of_wrists_with_boxes(top, tmp_path):
    "From an archive to the report: one view, three classes, no sides; images without a box borrow one"
    data = tmp_path/'wrists'
    import_wrists(top, write_archive(tmp_path/'archive'), data)
    assert read_study(data)==parse_study(WRIST)
    done = study(top, '--data', data, '--run', 'wrist', '--set', SETTINGS)
    assert 'study wrist: Wrists of children; 3 classes' in done.stderr
    run = top/'_runs'/'wrist'
    pairs = pd.read_csv(run/'split'/'pairs.csv', keep_default_na=False)
    assert set(pairs.caption)=={f'A frontal radiograph of a wrist with {p}' for p in ('no finding', 'fracture', 'metal')}
    assert (pairs.mask_source=='annotated').sum()==20 and set(pairs[pairs.mask_source=='heuristic'].pathology)=={'no finding', 'metal'}
    config = json.loads((run/'ac_gan'/'config.json').read_text())
    assert config['label_fields']=={'pathology': ['no finding', 'fracture', 'metal']}
    assert {p.name for p in (run/'wgan_gp').glob('PA__*')}<={'PA__no_finding', 'PA__fracture', 'PA__metal'}
    report = (run/'report.html').read_text()
    assert 'Synthetic wrist radiographs: report of the run wrist' in report and 'pretrained on simulated elbows, not on radiographs of a wrist' in report
    for model in ('sdxl', 'flux', 'tac_gan'): assert list((run/model/'samples').glob('*/*.png'))
    refused = study(top, '--data', data, '--study', 'elbow', '--run', 'wrist', '--set', SETTINGS, check=False)
    assert refused.returncode!=0 and 'Traceback' not in refused.stderr

@pytest.mark.long('a study to its report, a minute')
def test_a_study_of_two_classes_without_masks(top, tmp_path):
    data = toy_shoulders(tmp_path/'shoulders')
    done = study(top, '--data', data, '--study', tmp_path/'two.yaml', '--run', 'two', '--set', SETTINGS)
    assert 'study mura-toy: Two classes; 2 classes' in done.stderr
    report = (top/'_runs'/'two'/'report.html').read_text()
    assert 'Synthetic shoulder radiographs' in report and 'All 40 masks were suggested' in re.sub('<[^>]+>', '', report)

def test_a_definition_without_images_is_refused_before_anything_starts(tmp_path):
    (tmp_path/'mine.yaml').write_text(WRIST)
    done = subprocess.run([sys.executable, '-m', 'elbowsynth.run', 'study', '--study', str(tmp_path/'mine.yaml'), '--run', 'none'], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode!=0 and 'no simulated radiographs for the study wrist; fix: ' in done.stderr and not (ROOT/'_runs'/'none'/'plan.json').exists()
    done = subprocess.run([sys.executable, '-m', 'elbowsynth.run', 'study', '--study', 'wirst'], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode!=0 and 'Traceback' not in done.stderr and "no study 'wirst': expected a file, or one of chestxray14, elbow, " in done.stderr

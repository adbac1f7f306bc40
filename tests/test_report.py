"The page of a run: what a reader sees first, in which words, with which numbers, on paper and on a phone; findings by hand are in the cells of its notebook"
import ast, re
from html.parser import HTMLParser
import cv2, numpy as np, pandas as pd
import pytest
from conftest import ROOT
from elbowsynth.core import save_json
from elbowsynth.report.run_summary import escape_text
from elbowsynth.report.report import findings, read_evidence, warnings, write_page
from test_site import chromium

# A made run: two models, 24 test pairs, made scores

MODELS = {'ac_gan': 'full image', 'sdxl': 'inpainting'}
CURVES = {'ac_gan': {0: .25, 30: .3125}, 'sdxl': {0: .8, 8: .8125, 10: .75}}

def write_tables(run, models):
    "The tables of `metrics` and `figures` of a made run"
    summary = [(m, 'samples', e, 24, s, s, 1-s, 1-s) for m in models for e, s in CURVES[m].items()]
    best = [(MODELS[m], metric, m, 8, 24, .8125, .5, 1.625) for m in models for metric in ('ssim', 'ms_ssim', 'mmd2', 'mmd2_paper_unit_sigma10')]
    changes = [(m, 'training', 'ssim', 0, max(e for e in CURVES[m] if e!=10), .25, .3125 if m=='ac_gan' else .8125, .3, .83, .0625, .03, .09, 24) for m in models]
    if 'sdxl' in models: changes.append(('sdxl', 'boost', 'ssim', 8, 10, .8125, .75, .7, .8, -.0625, -.09, -.03, 24))
    comparison = [(MODELS[m], 'ssim', m, 8, 24, .8125, b, .875, True) for m in models for b in (['telea'] if m=='sdxl' else ['mean_image'])]
    tables = {
        'metrics/summary': (['model', 'source', 'epoch', 'n_pairs', 'ssim', 'ms_ssim', 'mmd2', 'mmd2_paper_unit_sigma10'], summary),
        'metrics/best_checkpoints': (['task', 'metric', 'model', 'epoch', 'n_pairs', 'score', 'noise_score', 'noise_improvement'], best),
        'metrics/baseline_comparison': (['task', 'metric', 'model', 'epoch', 'n_pairs', 'score', 'baseline', 'baseline_score', 'baseline_is_better'], comparison),
        'figures/checkpoint_changes': (['model', 'phase', 'metric', 'epoch_from', 'epoch_to', 'score_from', 'score_to', 'score_low', 'score_high', 'difference', 'ci_low',
                                        'ci_high', 'n_pairs'], changes),
        'figures/nearest': (['model', 'epoch', 'pair', 'nearest_training_image', 'distance'], [(m, 8, 'p0', 't0', 31.5) for m in models]),
        'figures/seeds': (['task', 'metric', 'model', 'n_seeds', 'mean', 'std', 'min', 'max'], [(MODELS[m], 'ssim', m, 1, .5, None, .5, .5) for m in models])}
    for name, (columns, rows) in tables.items(): pd.DataFrame(rows, columns=columns).to_csv(run/f'{name}.csv', index=False)

def make_run(run, models=('ac_gan', 'sdxl'), with_images=True, scored=True):
    "A run of made scores, with pictures"
    for name in ('split', 'images', 'metrics', 'figures', 'logs', *models): (run/name).mkdir(parents=True)
    pairs = [(f'{kind}{i}', f'{kind}{i}', f'{kind} {i//2}', 'joint effusion', 'train' if kind=='t' else 'test', 'heuristic') for kind in 'tp' for i in range(24)]
    pd.DataFrame(pairs, columns=['pair', 'image', 'patient', 'pathology', 'split', 'mask_source']).to_csv(run/'split'/'pairs.csv', index=False)
    if with_images:
        images = {'image': [o[0] for o in pairs], 'inverted': [True]*5+[False]*43, 'kept_fraction': [.9]*7+[1.]*41, 'overlay_blocks': [1]*11+[0]*37}
        pd.DataFrame(images).to_csv(run/'images'/'images.csv', index=False)
        (run/'images'/'rejects.csv').write_text('file,reason\nbad.png,file is truncated\n')
    if scored:
        write_tables(run, models)
        info = {'models': list(models), 'missing_models': [m for m in ('ac_gan', 'flux') if m not in models], 'inpainting_models': [m for m in models if m=='sdxl'],
                'n_pairs': 24, 'size': 256, 'extractor': 'efficientnet_lite0'}
        save_json(run/'metrics'/'metrics.json', info)
        for model in models:
            for kind in ('curves', 'samples', 'nearest'): picture(run/'figures'/f'{model}-{kind}.png', 1000, 400)
    values = {'preprocess': {'data': 'raw'}, 'phantom': {'out': 'raw'}, 'ac_gan': {'seed': 0, 'epochs': 30, 'size': 64},
              'sdxl': {'seed': 0, 'epochs': 8, 'size': 128, 'base_model': 'tiny-sdxl'}}
    for stage in ('preprocess', *models): save_json(run/stage/'stage.json', {'name': stage, 'values': values[stage], 'versions': {'torch': '2'},
                                                                                        'commit': f'{stage[0]}0123456789', 'machine': 'Linux, CPU 5000, 2 cores'})
    return run

def picture(path, width, height):
    assert cv2.imwrite(str(path), np.full((height, width), 200, np.uint8))

@pytest.fixture(scope='module')
def made(tmp_path_factory):
    run = make_run(tmp_path_factory.mktemp('report')/'made')
    return run, write_page(run).read_text()

class Reader(HTMLParser):
    "What a reader of a page meets, in order: (kind, text)"
    def __init__(self, page):
        super().__init__()
        self.found, self.open, self.attributes = [], [], []
        self.feed(page)
    def handle_starttag(self, tag, attrs):
        self.attributes.append((tag, dict(attrs)))
        if tag=='img': self.found.append(('alt', dict(attrs).get('alt', '')))
        if tag not in ('img', 'meta', 'br'): self.open.append(tag)
    def handle_endtag(self, tag):
        if tag in self.open:
            while self.open.pop()!=tag: pass
    def handle_data(self, data):
        if self.open and self.open[-1]!='style' and data.strip(): self.found.append((self.open[-1], ' '.join(data.split())))
    def texts(self, *kinds): return [text for kind, text in self.found if kind in kinds]
    def all_text(self): return ' '.join(text for _, text in self.found)

def visible(page): return Reader(page).all_text()

# What a reader sees first

def test_the_page_begins_with_what_was_run_and_found(made):
    "In this order, all of it above the first figure and the first table; settings come last and are folded"
    run, page = made
    signs = ['report of the run made', '>Models<', '>Data<', '>When<', '>Code<', '>Machine<', '>Findings<', 'What not to conclude', 'What to do next', '<figure', '<table', 'Pairs by pathology',
             '<details', 'Settings that differ']
    at = [page.index(sign) for sign in signs]
    assert at==sorted(at), list(zip(signs, at))
    assert '<details open' not in page
    first_screen = visible(page[:page.index('<figure')])
    for words in ('simulated radiographs: 24 images of 12 patients for training', '24 images of 12 patients held out', 'elbowsynth', 'commits a0123456789, p0123456789 and s0123456789', 'Linux, CPU 5000, 2 cores', 'PyTorch 2'): assert words in first_screen, words

def test_three_to_six_findings_good_or_bad(made):
    run, page = made
    found = findings(read_evidence(run))
    assert 3<=len(found)<=6
    for finding in found:
        assert finding.title in visible(page)
        assert f'href="#{finding.section}"' in page and f'id="{finding.section}"' in page
    titles = ' '.join(f.title for f in found)
    for words in ("By SSIM tiny-sdxl scores below Telea's inpainting", 'AC-GAN scores below the mean training image', 'The boosted learning rate harmed tiny-sdxl',
                  'All 48 masks were suggested by a heuristic', 'painted over text or markings in 11 of 48 images'): assert words in titles, words
    assert '5 were inverted because bone was dark, 7 were cropped, 1 of 49 files were rejected' in ' '.join(f.detail for f in found)

def test_warnings_and_next_steps_are_on_the_first_screen(made):
    run, page = made
    first_screen = visible(page[:page.index('<figure')])
    for words in ('The radiographs are simulated', 'used a small base model: tiny-sdxl', 'one seed', 'Not run, or without samples: FLUX', 'make study DATA=FOLDER', 'Draw masks'): assert words in first_screen, words
    targets = [dict(a)['href'] for tag, a in Reader(page).attributes if tag=='a']
    assert targets and all(t.startswith('#') or (run/t).exists() for t in targets), targets

# Names, numbers and words

STAND_IN = re.compile(r'(?<![\w-])(SDXL|FLUX)(?![\w-])')
def plainly_named(reader): return [t for kind, t in reader.found if kind in ('h1', 'h2', 'h3', 'th', 'td', 'caption', 'figcaption', 'alt', 'strong') and STAND_IN.search(t)]

def test_small_models_are_never_called_by_the_names_of_the_published_ones(made):
    run, page = made
    reader = Reader(page)
    assert plainly_named(reader)==[] and sum('tiny-sdxl' in t for t in reader.texts('h3', 'td', 'figcaption', 'alt', 'strong', 'span'))>5
    faulty = Reader(page.replace('<h3>tiny-sdxl', '<h3>SDXL'))              # the test sees such a name
    assert plainly_named(faulty)==['SDXL']

def numbers_in(text): return re.findall(r'(?<![\w.])\d+(?:\.\d+)?(?![\w.]*\w)', text.replace('\N{MINUS SIGN}', ' ').replace('+', ' '))
def numbers_of_files(run):
    "Every number in the result files, as the page writes it"
    from elbowsynth.paper import FACTS
    values = [v for p in run.glob('*/*.csv') for column in pd.read_csv(p) for v in pd.read_csv(p)[column] if isinstance(v, (int, float)) and v==v]
    values += [float(t) for p in run.glob('*/*.json') for t in re.findall(r'\d+\.?\d*', p.read_text())]+[v for v, _ in FACTS.values() if isinstance(v, (int, float))]
    texts = {f'{abs(v):.3f}' for v in values} | {f'{abs(v):g}' for v in values}
    pairs, images = pd.read_csv(run/'split'/'pairs.csv'), pd.read_csv(run/'images'/'images.csv')
    counts = [len(pairs), len(images), len(images)+1, 1, (images.overlay_blocks>0).sum(), images.inverted.sum(), (images.kept_fraction<1).sum()]
    return texts | {str(c) for c in counts}

def typed_numbers(known, texts): return [n for text in texts for n in numbers_in(text) if n not in known]

def test_each_number_in_a_finding_comes_from_a_file(made):
    run, _ = made
    evidence = read_evidence(run)
    texts = [f'{f.title}. {f.detail}' for f in findings(evidence)]+warnings(evidence)
    assert len([n for t in texts for n in numbers_in(t)])>20
    known = numbers_of_files(run)
    assert typed_numbers(known, texts)==[]
    assert typed_numbers(known, ['SSIM rises to 0.777 in 36 pairs'])==['0.777', '36']         # the test sees typed ones

ALLOWED_DIGITS = {'95 %', '64 x 64', 'ResNet-50', 'resnet50', 'Table 1', 'Table 3', '20 different images', 'of 255 gray levels', '.seed=1'}
def rules_with_digits(source):
    "Texts with a digit in the functions that write findings, warnings and steps"
    found = []
    for f in [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.FunctionDef)]:
        if not re.search('finding|warning|steps|sentence|title|detail|_text$', f.name) or re.search('machine|when', f.name): continue      # dates
        docstring = ast.get_docstring(f, clean=False)
        formats = {id(c) for n in ast.walk(f) if isinstance(n, ast.FormattedValue) and n.format_spec for c in ast.walk(n.format_spec)}
        for c in [c for c in ast.walk(f) if isinstance(c, ast.Constant) and isinstance(c.value, str) and c.value!=docstring and id(c) not in formats]:
            text = c.value
            for allowed in ALLOWED_DIGITS: text = text.replace(allowed, '')
            if re.search(r'(?<![\w.+{-])\d(?!f)', text): found.append((f.name, c.value))
    return found

def test_no_rule_has_a_typed_number():
    source = (ROOT/'elbowsynth'/'report'/'report.py').read_text(encoding='utf-8')
    assert rules_with_digits(source)==[]
    assert rules_with_digits('def my_finding(x):\n    return f"SSIM is 0.83, not {x}"')==[('my_finding', 'SSIM is 0.83, not ')]

# Figures and tables

def test_each_figure_has_a_caption_and_another_text_for_those_who_do_not_see_it(made):
    _, page = made
    reader = Reader(page)
    captions, alternatives = reader.texts('figcaption'), reader.texts('alt')
    assert len(captions)==len(alternatives)==6 and len(set(captions))==6 and 'No description' not in page
    for caption, alternative in zip(captions, alternatives): assert len(alternative)>25 and alternative!=caption
    assert 'Scores of tiny-sdxl from epoch 0 to 10: SSIM from 0.800 to 0.750' in ' '.join(alternatives)
    assert 'nearest training image by the root mean square difference of gray levels at 64 x 64 pixels; epoch 8' in ' '.join(captions)

def test_a_table_of_one_seed_is_left_out_and_one_of_two_is_shown(made, tmp_path):
    _, page = made
    assert 'Training seeds' not in page
    run = make_run(tmp_path/'twice')
    seeds = pd.read_csv(run/'figures'/'seeds.csv').assign(n_seeds=2, std=.125)
    seeds.to_csv(run/'figures'/'seeds.csv', index=False)
    assert 'Training seeds' in write_page(run).read_text()

def test_table1_has_two_blocks(made):
    captions = Reader(made[1]).texts('caption')
    assert [c for c in captions if c.startswith('Table 1')]==['Table 1, models that generate full images', 'Table 1, models that inpaint']

# Runs in which something is missing

@pytest.mark.parametrize('change', [
    {'models': ['sdxl']}, {'models': ['ac_gan']}, {'with_images': False}, {'models': ['sdxl'], 'with_images': False}, {'scored': False}],
    ids=['only SDXL', 'only a GAN', 'no images.csv', 'SDXL and no images.csv', 'not scored'])
def test_a_run_with_missing_stages_has_a_report(tmp_path, change):
    run = make_run(tmp_path/'part', **change)
    text = visible(write_page(run).read_text())
    assert 'What not to conclude' in text and not re.search(r'\b(nan|None|NaN|DataFrame)\b', text), re.findall(r'.{30}\b(?:nan|None|NaN|DataFrame)\b', text)
    if not change.get('with_images', True): assert 'What preprocessing did is not recorded' in text
    if change.get('models')==['sdxl']: assert 'Not run, or without samples: AC-GAN' in text
    if not change.get('scored', True): assert 'No model was scored' in text

def test_a_damaged_table_is_an_error_that_names_it(tmp_path):
    run = make_run(tmp_path/'damaged')
    write_page(run)
    before = (run/'report.html').read_bytes()
    (run/'metrics'/'metrics.json').write_text('{"models": [')
    with pytest.raises(ValueError, match='metrics.json is damaged'): write_page(run)
    assert (run/'report.html').read_bytes()==before

# One file, on paper and on a phone

def outside(page): return re.findall(r'(?:src|href|url\()\s*=?\s*["\']?((?:https?:)?//[^"\')\s>]+)', page)

def test_one_offline_file_without_scripts(made):
    _, page = made
    assert '<script' not in page and 'Content-Security-Policy' in page[:600] and outside(page)==[]
    assert outside('<img src="https://x.y/z.png"><link href=//cdn/a.css>')==['https://x.y/z.png', '//cdn/a.css']
    assert not re.search(r'\son\w+\s*=', page)

def test_names_of_files_are_text(tmp_path):
    run = make_run(tmp_path/'<b>bold & "quoted"')
    (run/'images'/'rejects.csv').write_text('file,reason\n<img src=x onerror=fired()>,<script>fired()</script>\n')
    page = write_page(run).read_text()
    assert '<img src=x' not in page and '<b>bold' not in page and '<script' not in page
    assert '<img src=x onerror=fired()>' in visible(page) and 'report of the run <b>bold & "quoted"' in visible(page)

@pytest.fixture(scope='module')
def browser():
    with chromium() as b: yield b

def test_the_page_fits_a_phone_and_a_screen(made, browser):
    run, _ = made
    for width in (390, 1400):
        page = browser.new_page(viewport={'width': width, 'height': 900})
        page.goto((run/'report.html').as_uri())
        assert page.evaluate('document.documentElement.scrollWidth')<=width
        figures = page.evaluate("[...document.querySelectorAll('figure')].map(f => f.getBoundingClientRect().width)")
        assert min(figures)>.9*min(width, 1184)-40, figures                    # a figure fills the page
        page.close()

def test_in_print_the_folded_parts_are_shown_and_no_figure_is_cut(made, browser):
    run, _ = made
    page = browser.new_page(viewport={'width': 794, 'height': 1123})           # A4
    page.goto((run/'report.html').as_uri())
    shown = "() => [...document.querySelectorAll('details .table, details li')].map(e => e.checkVisibility({contentVisibilityAuto: true}) && e.getBoundingClientRect().height>0)"
    assert not any(page.evaluate(shown))
    page.emulate_media(media='print')
    page.wait_for_function(f'() => ({shown})().every(is_shown => is_shown)', timeout=10_000)    # the browser lays it out again
    assert len(page.evaluate(shown))>5
    sizes = page.evaluate("[...document.querySelectorAll('figure img')].map(i => [i.getBoundingClientRect().height, i.getBoundingClientRect().right])")
    assert all(height<900 and right<=794 for height, right in sizes), sizes
    assert page.evaluate("[...document.querySelectorAll('figure')].every(f => getComputedStyle(f).breakInside=='avoid')")
    page.close()

@pytest.mark.parametrize('text', ['<img src=x onerror=alert(1)>.png', '**bold** `code` | cell', '[a](javascript:1)', 'a & "b"', '# heading', '$x$ _y_'])
def test_texts_of_data_are_no_markup_in_markdown(text):
    "A Markdown reader and an HTML parser see the text itself"
    import html, mistune
    page = mistune.create_markdown(escape=False, plugins=['table'])(escape_text(text)).strip()
    assert re.findall(r'<[^>]*>', page)==['<p>', '</p>'] and html.unescape(re.sub(r'<[^>]*>', '', page))==text

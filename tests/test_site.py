"The website: built in a copy of the checkout, read by the checker, opened in a browser; and the README"
import contextlib, functools, http.server, json, os, posixpath, re, shutil, sys, threading
from html import unescape
from pathlib import Path
from urllib.parse import urlsplit
import pytest, yaml
from conftest import ALL, ROOT, copy_of_checkout, sh
from elbowsynth.data.classes import PATHOLOGIES
from elbowsynth.paper import FACTS
from elbowsynth.report.claims import claims
from elbowsynth.report.tables import PROFILES
from elbowsynth.site import (
    PageParser, check_site, closing_text, differs_page, exports, link_target, localize_links, module_name, nbdev_pages, raw_html_outputs, read_bib,
    read_notebooks, resolve, run_finding, run_renderer, unlink_code, vendor_assets)

NBS = ROOT/'nbs'
PROSE = sorted(NBS.glob('*.qmd'))+[NBS/'index.ipynb']
GENERATED = {'differs.qmd', 'reference.qmd', 'references.qmd'}
SCREENSHOTS = ROOT/'tests'/'screenshots'
KEY_PAGES = ('index', 'results', 'claims', 'appendix', '5_evaluation/65_metrics', 'your-data')

def markdown(notebook): return '\n\n'.join(''.join(c['source']) for c in notebook['cells'] if c['cell_type']=='markdown')

def front_page(): return markdown(json.loads((NBS/'index.ipynb').read_text(encoding='utf-8')))

# Sources of the pages

def test_bibliography_has_the_sixty_references_of_the_paper():
    refs = read_bib((ROOT/'nbs'/'references.bib').read_text(encoding='utf-8'))
    assert sorted(int(e['paper']) for e in refs.values() if 'paper' in e)==list(range(1, 61))
    assert all(e['author'] and e['title'] and re.fullmatch(r'\d{4}', e['year']) for e in refs.values())
    first = {e['paper']: (e['author'].split(',')[0].split(' and ')[0], e['year']) for e in refs.values() if 'paper' in e}
    assert (first['8'], first['21'], first['35'], first['45'], first['60'])==(('Gretton', '2012'), ('Gulrajani', '2017'), ('Gong', '2019'), ('Wang', '2004'), ('Zhou', '2022'))

NOT_PROSE = r'```.*?```|`[^`\n]*`|\$\$.*?\$\$|\$[^$\n]+\$|\{\{[^}]*\}\}|\{#[^}]*\}|\]\([^)]*\)|^---\n.*?^---$|@\w+'
# Kinds of numbers that may be typed: places in the paper, names of models, licenses, file formats and versions
ALLOWED_KINDS = r'(?:Sections?|Tables?|Figures?) \d[\d., and]*(?:to \d[\d.]*)?|FLUX\.1|ResNet-50|EfficientNet-Lite0|L40|Apache-2\.0|Python [\d.]+ to [\d.]+|16-bit|MMD²'
MEASURES = r'\b(?:half|thirds?|quarters?|tenths?|dozens?|twenty|sixty|hundreds?|thousands?|millions?|billions?|percent)\b'

def typed_numbers(text):
    "Numbers in prose, in digits or as words for quantities that are measured"
    text = re.sub(NOT_PROSE, ' ', text, flags=re.S|re.M)
    return re.findall(rf'\d*\.\d+|\d+\s?%|\b\d+\b|{MEASURES}', re.sub(ALLOWED_KINDS, ' ', text))

@pytest.mark.parametrize('path', [pytest.param(p, id=p.stem) for p in PROSE])
def test_no_number_is_typed(path):
    text = front_page() if path.stem=='index' else path.read_text(encoding='utf-8')
    allowed = {'2', '14', '15', '60'} if path.stem=='index' else set()       # see test_numbers_of_the_front_page
    assert [n for n in typed_numbers(text) if n not in allowed]==[]

def test_typed_numbers_are_found():
    assert typed_numbers('It was 0.85 (Section 3.2), 12 images, 30% and {{n}}, `0.1`, $x^{10}$.')==['0.85', '12', '30%']
    assert typed_numbers("The paper's Tables 4 to 6 and Figure 9: about three quarters, a dozen in 7 rows [@wang2004].")==['quarters', 'dozen', '7']

def test_numbers_of_the_front_page():
    text = front_page()
    profiles = {name: (ROOT/'params'/f'{name}.yaml').read_text(encoding='utf-8') for name in ('smoke', 'demo', 'finetuning_effect')}
    for name, profile in profiles.items():
        [row] = [line for line in text.splitlines() if line.startswith('|') and f'PROFILE={name}`' in line]
        minutes = PROFILES[f'{name}.minutes']
        assert minutes in row and minutes in profile.splitlines()[0]
        assert '2 CPU cores' in row and 'two processor cores' in profile.splitlines()[0].lower()
    assert re.findall(r'under (\d+) minutes', text)==['15']*2                 # both of the demo
    assert re.findall(r'(\d+) patients', text)==[str(yaml.safe_load(profiles['demo'])['phantom']['n_patients'])]
    assert PROFILES['demo.patients']==yaml.safe_load(profiles['demo'])['phantom']['n_patients']
    assert re.findall(r'(\d+) classes', text)==[str(len(PATHOLOGIES))]==[str(FACTS['classes'][0])]

def page_links(path, text):
    "Paths below `nbs` of the notebooks and pages that a text links to"
    folder = path.parent.relative_to(NBS).as_posix()
    text = re.sub(r'^```.*?^```', '', text, flags=re.S|re.M)
    return [link_target(link, folder) for link in re.findall(r'\]\(([^)#:\s]+\.(?:ipynb|qmd))(?:#[^)]*)?\)', text)]

@pytest.mark.parametrize('path', [pytest.param(p, id=p.stem) for p in PROSE])
def test_links_of_the_pages_exist(path):
    text = front_page() if path.stem=='index' else path.read_text(encoding='utf-8')
    assert [link for link in page_links(path, text) if link not in GENERATED and not (NBS/link).is_file()]==[]

def sidebar_pages(contents):
    "The pages of a sidebar or of a section"
    listed = []
    for item in contents: listed += [item] if isinstance(item, str) else sidebar_pages(item['contents'])
    return listed

def test_every_page_but_the_first_is_in_one_sidebar():
    config = yaml.safe_load((ROOT/'_quarto.yml').read_text(encoding='utf-8'))
    listed = [name for sidebar in config['website']['sidebar'] for name in sidebar_pages(sidebar['contents'])]
    pages = {*read_notebooks(NBS), *GENERATED, *(p.name for p in NBS.glob('*.qmd'))}-{'index.ipynb'}
    assert sorted(listed)==sorted(f'nbs/{name}' for name in pages)

def test_key_pages_have_a_screenshot():
    paths = list(SCREENSHOTS.glob('*.png'))
    assert sorted(p.stem for p in paths)==sorted(posixpath.basename(name) for name in KEY_PAGES)
    assert sum(p.stat().st_size for p in paths)<1_500_000

# The README

def python_example():
    [code] = re.findall(r'```python\n(.*?)```', (ROOT/'README.md').read_text(encoding='utf-8'), re.S)
    return code

def test_python_example_of_the_readme_runs(tmp_path, monkeypatch, capsys):
    code = python_example()
    assert len([line for line in code.splitlines() if line.strip()])<=6
    monkeypatch.chdir(tmp_path)
    exec(compile(code, 'README.md', 'exec'), {})                    # here, where the packages are imported
    assert capsys.readouterr().out.splitlines()[-1]=='(2, 128, 128)'

def words_without_links(text): return re.sub(r'!?\[([^\]]*)\]\([^)]*\)', r'\1', text).split()

def test_readme_is_the_front_page():
    text = (ROOT/'README.md').read_text(encoding='utf-8')
    assert '{{' not in text
    finding = run_finding(NBS/'results'/'demo')
    assert finding in text, 'the README shows the finding of another run: make readme'
    assert words_without_links(text.split('-->', 1)[1].replace(finding, '', 1))==words_without_links(front_page())
    links = [link for link in re.findall(r'\]\(([^)\s]+)\)', text) if not link.startswith(('http', '#'))]
    assert len(links)>50
    assert [link for link in links if not (ROOT/link.partition('#')[0]).is_file()]==[]

# Notebooks in folders: each of these failed without an error when notebooks lay in one folder only

def test_nbdev_publishes_the_pages_that_links_are_made_from():
    from nbdev.doclinks import NbdevLookup
    pages = nbdev_pages(read_notebooks(NBS))
    assert pages['2_data/masks']=='2_data/31_masks.ipynb' and pages['index']=='index.ipynb'
    address = re.search(r'\((.*)\)', NbdevLookup().linkify('`elbowsynth.data.masks.heuristic_mask`'))[1]
    base_url = address.removesuffix('/2_data/masks.html#heuristic_mask')
    assert base_url!=address
    text = localize_links(f'[`f`]({address})', base_url, pages, '5_evaluation')
    assert text=='[`f`](../2_data/31_masks.ipynb#heuristic_mask)'

def test_citations_of_nested_notebooks():
    refs = read_bib((NBS/'references.bib').read_text(encoding='utf-8'))
    key = min(refs)
    assert f'](../references.qmd#ref-{key})' in resolve([f'[@{key}]'], refs, folder='5_evaluation')[0]
    assert f'](references.qmd#ref-{key})' in resolve([f'[@{key}]'], refs)[0]

def test_differences_keep_their_links():
    notebooks = read_notebooks(NBS)
    sections = {}
    for name, nb in notebooks.items():
        found = re.findall(r'^## Where this differs\n(.*?)(?=^## |\Z)', markdown(nb), re.M|re.S)
        if found: sections[name] = '\n'.join(found)
    links = {link for name, text in sections.items() for link in page_links(NBS/name, text)}
    page = differs_page(notebooks)
    assert links and links<=set(page_links(NBS/'differs.qmd', page))
    assert all(f'({name})' in page for name in sections)

# The site

with_quarto = pytest.mark.skip(reason='unmeasured: no quarto on PATH, so the pages were rendered with smalldocs only')
if shutil.which('quarto'): with_quarto = pytest.mark.long('renders all pages with Quarto, minutes')

@with_quarto
def test_quarto_renders_the_site(tmp_path):
    top = copy_of_checkout(tmp_path/'clone')
    done = sh(sys.executable, '-m', 'elbowsynth.site', cwd=top, PYTHONPATH=str(top))
    assert 'rendering with quarto' in done.stdout and check_site(top/'_docs')==[]

built_site = pytest.mark.long('builds all pages of the site, a minute')

@pytest.fixture(scope='module')
def site(tmp_path_factory):
    top = copy_of_checkout(tmp_path_factory.mktemp('site')/'clone')
    without_quarto = os.pathsep.join(folder for folder in os.environ['PATH'].split(os.pathsep) if not (Path(folder)/'quarto').exists())
    done = sh(sys.executable, '-m', 'elbowsynth.site', cwd=top, PYTHONPATH=str(top), PATH=without_quarto)
    assert 'no quarto on PATH' in done.stdout and 'python -m http.server' in done.stdout.replace(sys.executable, 'python')
    return top/'_docs'

def parsed(page): return PageParser(page.read_text(encoding='utf-8'))

@built_site
def test_every_page_is_built(site):
    # the command has checked every page, and fails on a fault
    pages = {p.relative_to(site/'nbs').with_suffix('').as_posix() for p in (site/'nbs').rglob('*.html')}
    top = site.parent
    sources = [*read_notebooks(top/'nbs'), *(p.name for p in (top/'nbs').glob('*.qmd')), *GENERATED]
    assert pages=={posixpath.splitext(name)[0] for name in sources}
    assert '2_data/31_masks' in pages and len(pages)>70
    results = (site/'nbs'/'results.html').read_text(encoding='utf-8')
    best = (top/'nbs'/'results'/'demo'/'metrics'/'best_checkpoints.csv').read_text().splitlines()
    first = dict(zip(best[0].split(','), best[1].split(',')))
    assert f'{float(first["score"]):.3f}' in results
    assert '0.292' in results and '0.868' in results                                         # the paper's, in their own columns
    assert (site/'nbs'/'references.html').read_text(encoding='utf-8').count('id="ref-')>=60

@built_site
def test_links_of_nested_pages(site):
    repository = 'https://github.com/elbowsynth/elbowsynth/blob/main/'
    files, n_links, n_docs = set(), 0, 0
    for page in sorted((site/'nbs').rglob('*.html')):
        html = page.read_text(encoding='utf-8')
        for link in parsed(page).links:
            assert 'elbowsynth.github.io' not in link, (page, link)                          # links of nbdev are relative
            if link.startswith(repository): files.add(link.removeprefix(repository).partition('#')[0])
            n_links += not urlsplit(link).scheme and bool(link.partition('#')[0])
        n_docs += len(re.findall(r'<em>[^<]*<a href="[^"]*\.html#[^"]*"><code>', html))       # links in rendered docstrings
    assert n_links>5000 and n_docs>5
    assert {f'nbs/{name}' for name in read_notebooks(NBS) if name!='index.ipynb'}<=files      # 'This page as a notebook'
    assert [name for name in sorted(files) if not (ROOT/name).is_file()]==[]
    nested = ' '.join(link for page in (site/'nbs').glob('*/*.html') for link in parsed(page).links)
    assert re.search(r'\.\./\d_\w+/\d\d_\w+\.html#\w+', nested)                             # a name of another folder

@built_site
def test_a_name_of_several_modules_leads_to_its_own_folder(site):
    notebooks = read_notebooks(site.parent/'nbs')
    names = [name for nb in notebooks.values() for name in {exported for exported, _ in exports(nb)}]
    ambiguous = {name for name in names if names.count(name)>1}
    wrong = []
    for page in (site/'nbs').glob('*/*.html'):
        html = page.read_text(encoding='utf-8')
        for link, name in re.findall(r'<a href="([^"#]+)#[^"]*"><code>(\w+)</code>', html):
            if name in ambiguous and '/' in link: wrong.append(f'{page.name}: {name} leads to {link}')
    assert wrong==[]

@built_site
def test_images_and_tables_of_nested_pages(site):
    page = parsed(site/'nbs'/'7_experiments'/'85_finetuning_effect.html')
    images = [file for file in page.files if 'results/finetuning_effect' in file]
    assert images and all((site/'nbs'/'7_experiments'/file).is_file() for file in images)
    tables = [link for link in parsed(site/'nbs'/'scores.html').links if link.endswith('.csv')]
    assert tables and all((site/'nbs'/link).is_file() for link in tables)
    assert any('final_samples' in file for file in parsed(site/'nbs'/'index.html').files)

@built_site
def test_reference_lists_every_export(site):
    html = unescape((site/'nbs'/'reference.html').read_text(encoding='utf-8'))
    for name, nb in read_notebooks(site.parent/'nbs').items():
        if not module_name(nb): continue
        for exported, _ in exports(nb):
            link = f'{name.removesuffix(".ipynb")}.html#{exported.lower()}'
            assert exported=='main' or f'href="{link}"' in html, link
    for package in ('core', 'data', 'diffusion', 'evaluation'): assert f'elbowsynth.{package}' in html

@built_site
def test_formulas_and_search_work_offline(site):
    page = (site/'nbs'/'methods-metrics.html').read_text(encoding='utf-8')
    assert '../site_libs/katex/katex.min.js' in page and 'cdn.' not in page and (site/'site_libs'/'katex'/'fonts').is_dir()
    index = json.loads((site/'search.json').read_text(encoding='utf-8'))
    assert any('glossary' in str(o) for o in index) and any('results.html' in str(o) for o in index)

@built_site
def test_the_front_page_begins_with_the_finding_and_three_ways_in(site):
    html = unescape((site/'nbs'/'index.html').read_text(encoding='utf-8'))
    main = re.sub(r'<[^>]*>', '', html[html.index('<main'):])
    run = json.loads((site.parent/'nbs'/'results'/'demo'/'run.json').read_text())['run']
    assert main.index(f'Finding of the run {run}')<main.index('Three ways in')<main.index('Quick start')
    assert '<figcaption' in html[:html.index('Three ways in</h2>')]

@built_site
def test_the_page_of_a_stage_shows_the_run(site):
    figures = {p.stem for p in (site.parent/'nbs'/'results'/'demo'/'figures').glob('*.png')}
    pages = {p.stem[3:]: p for p in (site/'nbs').glob('*/*.html')}
    for model in ('wgan_gp', 'ac_gan', 'tac_gan', 'sdxl', 'flux'):
        shown = ' '.join(parsed(pages[model]).files)
        for kind in ('curves', 'samples'): assert (f'{model}-{kind}' in figures)==(f'results/figures/{model}-{kind}.' in shown)
        assert 'in-the-run' in parsed(pages[model]).ids

@built_site
def test_further_scores_have_a_page_with_explained_columns(site):
    html = (site/'nbs'/'scores.html').read_text(encoding='utf-8')
    assert '<th>Pairs</th>' in html and '<em>Pairs</em>: image-pathology pairs' in html
    assert '<table' not in (site/'nbs'/'results.html').read_text(encoding='utf-8').split('id="further-scores-of-this-run"')[1].split('</section>')[0]

def test_each_open_claim_names_what_would_close_it():
    table = claims(NBS/'results'/'demo')
    closing = [closing_text(claim) for claim in table.to_dict('records')]
    assert [bool(text) for text in closing]==table.Verdict.str.startswith('open').tolist()
    row = {'What would decide it': 'x', 'Verdict': 'open (undecided: a tie; simulated images; small base models (FLUX); fewer than three seeds (FLUX))'}
    assert closing_text(row)=='radiographs of patients; the published base models; three training seeds of each model'

@built_site
def test_the_check_finds_faults(site, tmp_path):
    page = tmp_path/'broken'/'nbs'/'results.html'
    page.parent.mkdir(parents=True)
    page.write_text((site/'nbs'/'results.html').read_text(encoding='utf-8').replace('</main>', '<p>::: see @fig-x</p><a href="no.html">n</a><img src="gone.png"></main>'), encoding='utf-8')
    found = '; '.join(check_site(tmp_path/'broken'))
    for sign in (':::', '@fig-x', 'no.html, which does not exist', 'gone.png is missing', 'without alternative text'): assert sign in found

# Kinds of faults that a reader sees, on made fragments of what smalldocs and Quarto write

FRAGMENTS = {                                                       # name to page, the fault that is reported, and a page without it
    'raw link in a signature': (
        '<pre><code class="sourceCode python">def f(\n    bone:dict, # From [`ends`](11_anatomy.ipynb#ends)\n)</code></pre>', 'raw link in code',
        '<pre><code class="sourceCode python">def f(\n    bone:dict, # From `ends`\n)</code></pre>'),
    'public address': (
        '<a href="https://elbowsynth.github.io/elbowsynth/2_data/masks.html#f"><code>f</code></a>', 'public address', '<a href="a.html"><code>f</code></a>'),
    'name broken at its hyphen': (
        '<div class="sd-table"><table><tr><td>WGAN-GP, by MS-SSIM [6.9e-06, -8.8e-05]</td></tr></table></div>', 'broken at a hyphen: WGAN-GP, MS-SSIM, 6.9e-06, -8.8e-05',
        '<div class="sd-table"><table><tr><td><span class="nobr">WGAN-GP</span> is well-known</td></tr></table></div>'),
    'clipped command': (
        '<pre><code class="sourceCode bash">make study DATA=folder   # '+60*'x'+'</code></pre>', 'is clipped', '<pre><code class="sourceCode bash">make study DATA=folder</code></pre>'),
    'open sidebar': (
        '<nav id="quarto-sidebar"><ul class="collapse sidebar-section show"><li><a href="b.html" class="sidebar-link">b</a></li></ul></nav>', 'sections of the sidebar are open',
        '<nav id="quarto-sidebar"><ul class="collapse sidebar-section"><li><a href="b.html" class="sidebar-link">b</a></li></ul></nav>'),
    'no next page': (
        '<nav id="quarto-sidebar"><a href="a.html" class="sidebar-link active">a</a><a href="b.html" class="sidebar-link">b</a></nav>', 'no link to the next page',
        '<nav id="quarto-sidebar"><a href="a.html" class="sidebar-link active">a</a></nav><nav class="page-navigation"><a href="b.html">b</a></nav>'),
    'raw column names': (
        '<div class="sd-table"><table class="table"><tr><th>n_pairs</th></tr></table></div>', 'raw column names: n_pairs',
        '<div class="cell-output-display"><table class="dataframe"><tr><th>n_pairs</th></tr></table></div>'),
    'table that cannot scroll': (
        '<table class="table"><tr><td>1</td></tr></table>', 'cannot scroll', '<div class="sd-table" tabindex="0"><table class="table"><tr><td>1</td></tr></table></div>'),
    'Home on every page': (
        '<a class="nav-link active" href="index.html">Home</a>', 'Home is marked as the open page', '<a class="nav-link" href="index.html">Home</a>'),
    'jquery without requirejs': (
        "<script type=\"application/javascript\">define('jquery', [],function() {return window.jQuery;})</script>", 'requirejs', '<script>let define = 1</script>'),
    'web scripts of Quarto': (
        '<script src="https://cdnjs.cloudflare.com/ajax/libs/require.js/2.3.6/require.min.js" crossorigin="anonymous"></script>', 'from the web', '<script src="k.js"></script>')}

def made_site(folder, page, files=None):
    "A site of three pages, one of them with a fragment in it"
    folder.mkdir()
    other = {'index.html': '', 'b.html': '', 'k.js': '', 'a.html': page}
    for name, text in (other | (files or {})).items(): (folder/name).write_text(text)
    return folder

@pytest.mark.parametrize('kind', FRAGMENTS)
def test_the_check_finds_each_kind(kind, tmp_path):
    faulty, message, sound = FRAGMENTS[kind]
    found = check_site(made_site(tmp_path/'faulty', faulty))
    assert [f for f in found if message in f], found
    assert check_site(made_site(tmp_path/'sound', sound))==[]

@pytest.mark.parametrize('name, text, sign', [
    ('bootstrap.css', '@import"https://fonts.googleapis.com/css2?family=Source+Sans+Pro:wght@300;400;700&display=swap";a{b:c}', 'from the web'),
    ('site.css', 'html:not(.quarto-dark) main a { color: #17599f; }', 'body of a dark page'),
    ('quarto-search.js', 'const fuse = new window.Fuse([], { ignoreLocation: true, threshold: 0.1 });', 'search finds words that are only similar')])
def test_the_check_reads_styles_and_scripts(tmp_path, name, text, sign):
    assert [f for f in check_site(made_site(tmp_path/'faulty', '', {name: text})) if f.startswith(name) and sign in f]

QUARTO_PAGE = '''<!DOCTYPE html><html lang="en"><head>
<script src="https://cdnjs.cloudflare.com/ajax/libs/require.js/2.3.6/require.min.js" integrity="sha512-c3" crossorigin="anonymous"></script>
<script src="https://cdnjs.cloudflare.com/ajax/libs/jquery/3.5.1/jquery.min.js" integrity="sha512-bL" crossorigin="anonymous" data-relocate-top="true"></script>
<script type="application/javascript" data-relocate-top="true">define('jquery', [],function() {return window.jQuery;})</script>
<script src="https://cdnjs.cloudflare.com/polyfill/v3/polyfill.min.js?features=es6"></script>
<script defer="" src="https://cdn.jsdelivr.net/npm/katex@0.15.1/dist/katex.min.js"></script>
<link rel="stylesheet" href="https://cdn.jsdelivr.net/npm/katex@0.15.1/dist/katex.min.css" />
<script src="../../site_libs/quarto-search/quarto-search.js"></script></head><body class="nav-sidebar quarto-dark"><main>
<section id="bones"><h2 class="anchored" data-anchor-id="bones">Bones</h2>
<p>An <span class="math inline">x</span>. <img src="b.png" class="img-fluid"></p>
<figure class="figure"><p><img src="b.png"></p><figcaption>Figure&nbsp;1: Two bones</figcaption></figure>
<div class="cell-output cell-output-display"><div><table class="dataframe do-not-create-environment cell table table-sm table-striped small"><tr><td>MS-SSIM</td></tr></table></div></div>
<table class="caption-top table"><tbody><tr><td>-0.5</td><td>6.914e-06</td></tr></tbody></table></section></main></body></html>'''

# smalldocs writes url(...), Quarto quotes; both addresses have a semicolon, at which the style sheet must not be cut
SMALLDOCS_CSS = '@import url(https://fonts.googleapis.com/css2?family=Source+Sans+Pro:wght@300;400;700&display=swap);:root{--bs-blue: #2780e3}'
QUARTO_CSS = '@import"https://fonts.googleapis.com/css2?family=Source+Sans+Pro:wght@300;400;700&display=swap";:root{--bs-blue: #2780e3}'

@pytest.fixture(scope='module')
def quarto_site(tmp_path_factory):
    "A small site as Quarto writes it, vendored"
    site = tmp_path_factory.mktemp('quarto')/'_docs'
    libs, pages = site/'site_libs', site/'nbs'/'1_a'
    for folder in (libs/'bootstrap', libs/'quarto-search', pages): folder.mkdir(parents=True)
    (libs/'bootstrap'/'bootstrap-1a2b.min.css').write_text(QUARTO_CSS)
    (libs/'quarto-search'/'quarto-search.js').write_text('const fuse = new window.Fuse([], { ignoreLocation: true, threshold: 0.1 });')
    (libs/'bootstrap'/'cosmo.css').write_text(SMALLDOCS_CSS)
    (pages/'b.png').write_bytes(b'')
    (pages/'b.html').write_text(QUARTO_PAGE)
    (site/'nbs'/'site.css').write_text((NBS/'site.css').read_text())
    assert len(check_site(site))>8
    vendor_assets(site)
    return site

def test_pages_of_quarto_work_offline(quarto_site):
    assert check_site(quarto_site)==[]
    for name in ('bootstrap-1a2b.min.css', 'cosmo.css'):
        assert (quarto_site/'site_libs'/'bootstrap'/name).read_text()==':root{--bs-blue: #2780e3}'
    page = (quarto_site/'nbs'/'1_a'/'b.html').read_text()
    assert not re.search('https?:', page) and '../../site_libs/katex/katex.min.js' in page

def test_images_of_quarto_get_an_alternative_text(quarto_site):
    page = (quarto_site/'nbs'/'1_a'/'b.html').read_text()
    assert re.findall(r'alt="([^"]*)"', page)==['Bones', 'Figure 1: Two bones']

def test_html_outputs_do_not_make_quarto_load_requirejs():
    cells = [{'cell_type': 'code', 'outputs': [{'data': {'text/html': ['<b>1</b>\n', '```'], 'text/plain': '1'}}, {'text': 'x'}]}, {'cell_type': 'markdown'}]
    raw_html_outputs(cells)
    assert cells[0]['outputs'][0]['data']=={'text/markdown': '````{=html}\n<b>1</b>\n```\n````', 'text/plain': '1'}

def test_the_configuration_suits_both_renderers():
    config = yaml.safe_load((ROOT/'_quarto.yml').read_text(encoding='utf-8'))
    assert config['format']['html']['html-math-method']=='katex' and config['website']['page-navigation'] is True
    sidebars = config['website']['sidebar']
    links = [item['href'] for item in config['website']['navbar']['left']]
    for sidebar in sidebars:                                        # Quarto marks the first link that the page's sidebar has
        listed = sidebar_pages(sidebar['contents'])
        assert sidebar['collapse-level']==1 and len([link for link in links if link in listed])==1

def test_links_of_docstrings_stay_on_the_site():
    pages = {'2_data/masks': '2_data/31_masks.ipynb'}
    text = '[`f`](https://x.org/y/2_data/masks.html#f) and [`old`](https://x.org/y/gone.html#old) and [`z`](https://z.org/gone.html)'
    assert localize_links(text, 'https://x.org/y', pages)=='[`f`](2_data/31_masks.ipynb#f) and `old` and [`z`](https://z.org/gone.html)'
    fenced = '[`f`](a.ipynb#f)\n```python\ndef f(\n    b, # From [`g`](a.ipynb#g), see [words](b.ipynb)\n)\n```\n[`g`](a.ipynb)'
    assert unlink_code(fenced)=='[`f`](a.ipynb#f)\n```python\ndef f(\n    b, # From `g`, see words\n)\n```\n[`g`](a.ipynb)'

def test_what_a_renderer_says_is_heard(tmp_path, capsys):
    script = 'import sys\nfor i in range(3): print(f"[{i}/3] page")\nprint("WARNING: no such key", file=sys.stderr)\nsys.exit({})'
    assert run_renderer([sys.executable, '-c', script.replace('{}', '0')], tmp_path)==['WARNING: no such key']
    assert '[2/3] page' in capsys.readouterr().out
    with pytest.raises(RuntimeError, match='(?s)ended with exit code 3.*no such key'): run_renderer([sys.executable, '-c', script.replace('{}', '3')], tmp_path)

def serve(folder):
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args): pass
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server

LOOKS = {'desktop': {'width': 1400, 'height': 1000}, 'phone': {'width': 390, 'height': 844}}
SIDEWAYS = 'document.documentElement.scrollWidth-document.documentElement.clientWidth'

def axe_faults(page, look, scheme):
    from axe_playwright_python.sync_playwright import Axe
    found = Axe().run(page, options={'resultTypes': ['violations'], 'runOnly': ['wcag2a', 'wcag2aa', 'wcag21aa']}).response['violations']
    return [f'{look} {scheme}: axe {v["id"]} ({v["impact"]}), {len(v["nodes"])} times, first {v["nodes"][0]["html"][:150]}' for v in found if v['impact'] in ('serious', 'critical')]

def faults_in_browser(browser, url):
    "Faults at both widths, in light and dark mode; axe runs at desktop width in light mode and at phone width in dark mode"
    bad = []
    for look, other, scheme in (('desktop', 'phone', 'light'), ('phone', 'desktop', 'dark')):
        context = browser.new_context(viewport=LOOKS[look], color_scheme=scheme, reduced_motion='reduce')
        page = context.new_page()
        page.on('pageerror', lambda e: bad.append(f'{look}: {e}'))
        page.on('console', lambda m: bad.append(f'{look}: console: {m.text}') if m.type=='error' else None)
        page.on('requestfailed', lambda r: bad.append(f'{look}: not loaded: {r.url}'))
        page.goto(url, wait_until='load')
        if page.evaluate(SIDEWAYS)>0: bad.append(f'{look}: scrolls sideways by {page.evaluate(SIDEWAYS)}')
        if n := page.locator('.katex-error').count(): bad.append(f'{look}: {n} formulas are not set')
        if page.locator('.math').count() and not page.locator('.katex').count(): bad.append(f'{look}: no formula is set')
        bad += axe_faults(page, look, scheme)
        page.set_viewport_size(LOOKS[other])
        if page.evaluate(SIDEWAYS)>0: bad.append(f'{other} {scheme}: scrolls sideways by {page.evaluate(SIDEWAYS)}')
        context.close()
    return bad

def take_screenshots(browser, site, to):
    "Screenshots of the key pages, 900 pixels wide, in 128 colors"
    from PIL import Image
    server, to = serve(site), Path(to)
    to.mkdir(parents=True, exist_ok=True)
    for name in KEY_PAGES:
        page = browser.new_page(viewport={'width': 900, 'height': 2400}, color_scheme='light', reduced_motion='reduce')
        page.goto(f'http://127.0.0.1:{server.server_port}/nbs/{name}.html', wait_until='load')
        path = to/f'{posixpath.basename(name)}.png'
        page.screenshot(path=path)
        image = Image.open(path).convert('RGB').quantize(128, method=Image.Quantize.FASTOCTREE)
        image.save(path, optimize=True)
        page.close()
    server.shutdown()

@contextlib.contextmanager
def chromium():
    from playwright.sync_api import sync_playwright
    at = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')
    if not at: (pytest.fail if ALL else pytest.skip)('no chromium on PATH (on Debian: apt-get install chromium)')
    with sync_playwright() as p:
        b = p.chromium.launch(executable_path=at, args=['--no-sandbox', '--disable-gpu', '--disable-background-networking'])
        yield b
        b.close()

@pytest.fixture(scope='module')
def browser():
    with chromium() as b: yield b

@pytest.mark.long('opens every page in a browser, minutes')
def test_every_page_in_a_browser(site, browser):
    server = serve(site)
    found = {}
    for path in sorted((site/'nbs').rglob('*.html')):
        name = path.relative_to(site).as_posix()
        found[name] = faults_in_browser(browser, f'http://127.0.0.1:{server.server_port}/{name}')
    server.shutdown()
    assert len(found)>70
    assert {name: faults for name, faults in found.items() if faults}=={}

@built_site
def test_search_and_dark_mode_work(site, browser):
    server = serve(site)
    page = browser.new_page(viewport=LOOKS['desktop'])
    page.goto(f'http://127.0.0.1:{server.server_port}/nbs/index.html')
    page.locator('#quarto-search input').fill('phantom')
    page.wait_for_selector('.smalldocs-search-results a', timeout=30_000)
    assert page.locator('.smalldocs-search-results a').count()>0
    page.locator('.quarto-color-scheme-toggle').first.click()
    page.wait_for_function("() => document.documentElement.className.includes('quarto-dark')", timeout=30_000)
    server.shutdown()

CONTRAST = """([inner, outer]) => {
    const rgb = c => c.match(/[\\d.]+/g).slice(0, 3).map(v => { v /= 255; return v<=.03928 ? v/12.92 : ((v+.055)/1.055)**2.4 })
    const luminance = c => { const [r, g, b] = rgb(c); return .2126*r+.7152*g+.0722*b }
    const style = selector => getComputedStyle(document.querySelector(selector))
    const both = [luminance(style(inner).color), luminance(style(outer).backgroundColor)].sort()
    return (both[1]+.05)/(both[0]+.05) }"""
BROKEN_NAMES = """() => [...document.querySelectorAll('td, th')].flatMap(cell => {
    const found = [], walker = document.createTreeWalker(cell, NodeFilter.SHOW_TEXT)
    while (walker.nextNode()) for (const m of walker.currentNode.data.matchAll(/(?=[\\w.+-]*[A-Z\\d])[\\w.+]+(-[\\w.]+)+/g)) {
        const range = document.createRange()
        range.setStart(walker.currentNode, m.index); range.setEnd(walker.currentNode, m.index+m[0].length)
        if (new Set([...range.getClientRects()].map(r => Math.round(r.top))).size>1) found.push(m[0]) }
    return found })"""
CLIPPED = "() => [...document.querySelectorAll('pre')].filter(e => e.querySelector('code.bash') && e.scrollWidth>e.clientWidth).map(e => e.innerText)"

@built_site
@pytest.mark.parametrize('look, scheme', [('desktop', 'light'), ('desktop', 'dark'), ('phone', 'dark')])
def test_the_first_pages_read_well(site, browser, look, scheme):
    server = serve(site)
    page = browser.new_page(viewport=LOOKS[look], color_scheme=scheme, reduced_motion='reduce')
    for name in ('index', 'results', 'claims', 'limits'):
        page.goto(f'http://127.0.0.1:{server.server_port}/nbs/{name}.html', wait_until='load')
        assert page.evaluate("getComputedStyle(document.documentElement).getPropertyValue('--bs-blue')"), 'the style sheet of the theme is not read'
        assert page.evaluate(CLIPPED)==[] and page.evaluate(BROKEN_NAMES)==[] and page.evaluate(SIDEWAYS)<=0
        assert page.evaluate(CONTRAST, ['.smalldocs-search > .bi-search', '.smalldocs-search input'])>3
    page.close()
    server.shutdown()

def hits(page, words):
    "Titles that a search finds"
    page.locator('#quarto-search input').fill('')
    page.locator('#quarto-search input').fill(words)
    page.wait_for_selector('.smalldocs-search-results.show a, .smalldocs-search-results.show .search-none', timeout=30_000)
    page.wait_for_timeout(300)
    return page.locator('.smalldocs-search-results a').all_inner_texts()

@built_site
def test_the_search_finds_what_is_typed(site, browser):
    server = serve(site)
    page = browser.new_page(viewport=LOOKS['desktop'])
    page.goto(f'http://127.0.0.1:{server.server_port}/nbs/index.html')
    assert hits(page, 'phantmo')==[] and hits(page, 'zzqx')==[]
    assert any('Telea' in text or 'telea' in text for text in hits(page, 'telea'))
    found = hits(page, 'penalty gradient')                          # both words, in any order
    assert found and all('penalty' in text.lower() or 'gradient' in text.lower() for text in found)
    page.close()
    server.shutdown()

def test_the_browser_check_finds_faults(tmp_path, browser):
    (tmp_path/'bad.html').write_text('<!doctype html><html><head><title>x</title></head><body><img src="no.png"><div style="width:3000px">wide</div><script>nothing()</script></body></html>')
    server = serve(tmp_path)
    found = '; '.join(faults_in_browser(browser, f'http://127.0.0.1:{server.server_port}/bad.html'))
    server.shutdown()
    for sign in ('scrolls sideways', 'nothing is not defined', 'image-alt', 'html-has-lang'): assert sign in found, found

# What comes from data is text in every page, never markup

def hostile(column): return f'<img src=x onerror=fired("{column}")>&"`|*_a_{{{{run}}}}[b](javascript:fired()) $'

def write_hostile_run(folder):
    "A scored run whose files, folders, tables and settings all have hostile names"
    import cv2, numpy as np, pandas as pd
    from elbowsynth.core import save_json
    from elbowsynth.data.images import write_png
    from elbowsynth.evaluation.metrics import score_run
    from elbowsynth.evaluation.run_statistics import run_statistics
    run, model = folder/hostile('run'), hostile('model')
    rng, rows, mask = np.random.default_rng(0), [], np.zeros((176, 176), np.uint8)
    mask[60:120, 50:130] = 255
    for i in range(4):
        row = {name: f'{i}{hostile(name)}' for name in ('pair', 'image', 'patient', 'view', 'side', 'caption', 'mask_source')}
        rows.append(row | {'pathology': 'joint effusion', 'split': ('train', 'test')[i%2]})
        gray = (255*cv2.resize(rng.random((9, 9)), (176, 176))).astype(np.uint8)
        write_png(run/'images'/f'{row["image"]}.png', gray)
        write_png(run/'masks'/f'{row["pair"]}.png', mask)
        for source, epoch in (('samples', 0), ('samples', 3), ('raw', 3)):
            if i%2: write_png(run/model/source/f'{epoch:04d}'/f'{row["pair"]}.png', gray//2)
    (run/'split').mkdir()
    pd.DataFrame(rows).to_csv(run/'split'/'pairs.csv', index=False)
    images = pd.DataFrame({'image': [row['image'] for row in rows], 'file': hostile('file'), 'inverted': [True, False]*2, 'kept_fraction': .9, 'overlay_blocks': 1})
    images.to_csv(run/'images'/'images.csv', index=False)
    pd.DataFrame({'file': [hostile('rejected file')], 'reason': [hostile('reject reason')]}).to_csv(run/'images'/'rejects.csv', index=False)
    score_run(run, [model], size=176, extractor='efficientnet_lite0', device='cpu', statistics=run_statistics)
    pd.DataFrame(rows).assign(pathology=hostile('pathology')).to_csv(run/'split'/'pairs.csv', index=False)
    for path in (run/'metrics').glob('*.csv'):
        table, keys = pd.read_csv(path), ('baseline', 'metric', 'task', 'source', 'region', 'model', 'pair', 'checkpoint')
        for column in table.select_dtypes(['object', 'str']):
            if column not in keys and not (path.stem, column)==('mmd_intervals', 'convention'): table[column] = hostile(f'{path.stem} {column}')
        table.to_csv(path, index=False)
    info = json.loads((run/'metrics'/'metrics.json').read_text())
    save_json(run/'metrics'/'metrics.json', info | {'extractor': hostile('extractor'), 'missing_models': [hostile('missing model')]})
    stages = {'preprocess': {'data': '/data '+hostile('data'), 'aspect': hostile('aspect')}, 'flux': {'base_model': hostile('base model'), 'epochs': 2},
              model: {'base_model': 'tiny '+hostile('small base model'), 'epochs': 2}, 'metrics': {'extractor': hostile('metrics value'), 'models': [hostile('models')]}}
    for name, values in stages.items(): save_json(run/name/'stage.json', {'name': name, 'values': values, 'versions': {}})
    return run, model

def execute_report(run, model, to):
    "The cells of the stage `figures` below its parameters, executed by the runner's own engine"
    import nbformat, papermill
    nb = nbformat.read(NBS/'6_report'/'81_figures.ipynb', as_version=4)
    is_used = [any(sign in c.source for sign in ('#| slow', '#| export\nimport', '#| hide\nimport')) or 'parameters' in c.metadata.get('tags', []) or c.cell_type=='markdown' for c in nb.cells]
    nb.cells = [c for c, used in zip(nb.cells, is_used) if used and 'start_stage(' not in c.source and 'stage_files(' not in c.source]
    nb.cells.insert(0, nbformat.v4.new_code_cell('from elbowsynth.report.figures import *'))
    nbformat.write(nb, to/'cells.ipynb')
    papermill.execute_notebook(to/'cells.ipynb', to/'executed.ipynb', {'run': str(run), 'models': [model], 'out': 'figures'}, kernel_name='python3', cwd=ROOT, progress_bar=False)
    return to/'executed.ipynb'

@pytest.fixture(scope='module')
def hostile_run(tmp_path_factory):
    from elbowsynth.run import write_report
    folder = tmp_path_factory.mktemp('hostile')
    run, model = write_hostile_run(folder)
    execute_report(run, model, folder)
    return run, write_report(run)

LIVE = """() => [...document.querySelectorAll('*')].filter(e => [...e.attributes].some(a => a.name.startsWith('on') && a.value.includes('fired')
                  || a.value.trim().startsWith('javascript:'))).map(e => e.outerHTML)"""

def opened_in_browser(browser, path):
    "What a page ran, what it requested that no policy stopped, its live elements, and its visible text"
    page, requests = browser.new_page(), []
    page.on('requestfailed', lambda r: requests.remove(r.url) if r.failure=='csp' else None)
    page.add_init_script('window.ran = []; window.fired = name => window.ran.push(name)')
    page.on('request', lambda r: None if r.url.startswith('data:') else requests.append(r.url))
    page.goto(path.as_uri(), wait_until='load')
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")     # a folded part is read, too
    found = page.evaluate('window.ran'), [r for r in requests if r!=path.as_uri()], page.evaluate(LIVE), page.inner_text('body')
    page.close()
    return found

def test_the_browser_sees_a_live_name_and_the_policy_stops_it(tmp_path, browser):
    from elbowsynth.report.run_summary import secure_page
    page = f'<html><head><title>x</title></head><body>{hostile("name")}<img src="http://127.0.0.1:9/y.png"></body></html>'
    for name, text in (('live', page), ('secure', secure_page(page))): (tmp_path/f'{name}.html').write_text(text)
    ran, requests, live, _ = opened_in_browser(browser, tmp_path/'live.html')
    assert ran==['name'] and len(requests)==2 and live
    ran, requests, _, _ = opened_in_browser(browser, tmp_path/'secure.html')
    assert ran==[] and requests==[]

@pytest.mark.long('a browser, 20 s')
def test_hostile_names_are_text_in_the_report(hostile_run, browser):
    run, report = hostile_run
    assert 'Content-Security-Policy' in report.read_text()[:2000]
    page = report.parent.parent/'without policy.html'                  # escaping alone must be enough
    page.write_text(re.sub('<meta http-equiv="Content-Security-Policy"[^>]*>', '', report.read_text()))
    for path in (report, page):
        ran, requests, live, text = opened_in_browser(browser, path)
        assert (ran, requests, live)==([], [], [])
    shown = ['run', 'model', 'rejected file', 'reject reason', 'data', 'aspect', 'small base model', 'metrics value', 'extractor', 'missing model']
    assert [name for name in shown if hostile(name) not in text]==[]

def test_hostile_names_are_text_on_the_website(hostile_run, tmp_path, browser):
    from elbowsynth.report.tables import collect_results
    from elbowsynth.site import results_by_name
    run, _ = hostile_run
    collect_results(run, tmp_path/'results')
    names = ('run', 'model', 'data', 'base model', 'small base model', 'extractor', 'missing model', 'metrics value', 'mmd_intervals reason')
    text = '\n\n'.join(['---\ntitle: All\n---', *results_by_name(tmp_path/'results').values()])
    (tmp_path/'index.qmd').write_text(text, encoding='utf-8')
    (tmp_path/'_quarto.yml').write_text('project: {type: website, output-dir: _docs}\nwebsite: {title: t}\nformat: html\n')
    sh(Path(sys.executable).parent/'smalldocs', 'render', '.', '--quiet', cwd=tmp_path)
    ran, requests, live, shown = opened_in_browser(browser, tmp_path/'_docs'/'index.html')
    assert ran==[] and live==[] and [r for r in requests if r.endswith('/x')]==[]
    assert [name for name in names if hostile(name) not in shown]==[]

if __name__=='__main__':                                            # screenshots of the site in `_docs`, to be committed
    with chromium() as b: take_screenshots(b, ROOT/'_docs', SCREENSHOTS)

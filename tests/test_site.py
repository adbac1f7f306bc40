"The site as a visitor meets it: built in a copy, read by the checker, opened in a browser"
import contextlib, functools, http.server, json, re, shutil, sys, threading
from pathlib import Path
import pytest
from conftest import ALL, ROOT, copy_of_checkout, sh
from elbowsynth.site import check_site, read_bib

PROSE = sorted((ROOT/'nbs').glob('*.qmd'))+[ROOT/'nbs'/'index.ipynb']
SHOTS = ROOT/'tests'/'screenshots'
KEY_PAGES = ('index', 'results', 'claims', 'appendix', '30_metrics', 'your-films')

def test_the_bibliography_has_the_papers_sixty():
    refs = read_bib((ROOT/'nbs'/'references.bib').read_text(encoding='utf-8'))
    assert sorted(int(e['paper']) for e in refs.values() if 'paper' in e)==list(range(1, 61))
    assert all(e['author'] and e['title'] and re.fullmatch(r'\d{4}', e['year']) for e in refs.values())
    first = {e['paper']: (e['author'].split(',')[0].split(' and ')[0], e['year']) for e in refs.values() if 'paper' in e}
    assert (first['8'], first['21'], first['35'], first['45'], first['60'])==(('Gretton', '2012'), ('Gulrajani', '2017'), ('Gong', '2019'), ('Wang', '2004'), ('Zhou', '2022'))

def typed_numbers(text):
    "Decimal numbers in prose that stand for no place in the paper, version or formula"
    text = re.sub(r'```.*?```|`[^`\n]*`|\$\$.*?\$\$|\$[^$\n]+\$|\{\{[^}]*\}\}|^---.*?^---', ' ', text, flags=re.S|re.M)
    text = re.sub(r'Sections? [\d., and]+|FLUX\.1|ResNet-50|Apache-2\.0|Python [\d.]+ to [\d.]+|16-bit|\[\d\d (?=[^\]]+\]\()|\]\([^)]*\)', ' ', text)   # 16-bit: a kind of file
    return re.findall(r'\d*\.\d+|\d+\s?%|\b\d{2,}\b', text)

@pytest.mark.parametrize('path', [pytest.param(p, id=p.stem) for p in PROSE])
def test_no_number_is_typed(path):
    text = path.read_text(encoding='utf-8')
    if path.suffix=='.ipynb': text = '\n\n'.join(''.join(c['source']) for c in json.loads(text)['cells'] if c['cell_type']=='markdown')
    assert typed_numbers(text)==[]

def test_the_key_pages_have_their_pictures():
    assert sorted(p.stem for p in SHOTS.glob('*.png'))==sorted(KEY_PAGES)
    assert sum(p.stat().st_size for p in SHOTS.glob('*.png'))<1_500_000

def test_typed_numbers_are_seen(): assert typed_numbers('It was 0.85 (Section 3.2), 12 films, 30% and {{n}}, `0.1`, $x^{10}$.')==['0.85', '12', '30%']

@pytest.fixture(scope='module')
def site(tmp_path_factory):
    top = copy_of_checkout(tmp_path_factory.mktemp('site')/'clone')
    done = sh(sys.executable, '-m', 'elbowsynth.site', cwd=top, PYTHONPATH=str(top))
    assert 'quarto' in done.stdout and 'open ' in done.stdout
    return top/'_docs'

def test_every_page_is_there_and_whole(site):
    assert check_site(site)==[]
    pages, made = {p.stem for p in (site/'nbs').glob('*.html')}, {'differs', 'reference', 'references'}
    top = site.parent
    assert pages=={p.stem for p in [*(top/'nbs').glob('*.ipynb'), *(top/'nbs').glob('*.qmd')]} | made
    results = (site/'nbs'/'results.html').read_text(encoding='utf-8')
    best = (top/'nbs'/'results'/'demo'/'metrics'/'best.csv').read_text().splitlines()[1].split(',')
    assert f'{float(best[5]):.3f}' in results                                                # the first best score, from the file
    assert '0.292' in results and '0.868' in results                                         # the paper's, in their own column
    assert (site/'nbs'/'references.html').read_text(encoding='utf-8').count('id="ref-')>=60

def test_maths_and_search_need_no_network(site):
    page = (site/'nbs'/'methods-metrics.html').read_text(encoding='utf-8')
    assert '../site_libs/katex/katex.min.js' in page and 'cdn.' not in page and (site/'site_libs'/'katex'/'fonts').is_dir()
    index = json.loads((site/'search.json').read_text(encoding='utf-8'))
    assert any('glossary' in str(o) for o in index) and any('results.html' in str(o) for o in index)

def test_the_check_sees_a_broken_site(site, tmp_path):
    shutil.copytree(site, tmp_path/'broken')
    page = tmp_path/'broken'/'nbs'/'results.html'
    page.write_text(page.read_text(encoding='utf-8').replace('</main>', '<p>::: see @fig-x</p><a href="no.html">n</a><img src="gone.png"></main>'), encoding='utf-8')
    found = '; '.join(check_site(tmp_path/'broken'))
    for sign in (':::', '@fig-x', 'no.html, which is not there', 'gone.png is missing', 'without words'): assert sign in found

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
    "What a visitor would stumble over, at both widths and in light and dark; axe looks at desktop width in light and at phone width in dark"
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

def take_pictures(browser, site, to):
    "The key pages of a site from their top, 900 pixels wide, in few colours"
    from PIL import Image
    server, to = serve(site), Path(to)
    to.mkdir(parents=True, exist_ok=True)
    for name in KEY_PAGES:
        page = browser.new_page(viewport={'width': 900, 'height': 2400}, color_scheme='light', reduced_motion='reduce')
        page.goto(f'http://127.0.0.1:{server.server_port}/nbs/{name}.html', wait_until='load')
        page.screenshot(path=to/f'{name}.png')
        Image.open(to/f'{name}.png').convert('RGB').quantize(128, method=Image.Quantize.FASTOCTREE).save(to/f'{name}.png', optimize=True)
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
    found = {p.stem: faults_in_browser(browser, f'http://127.0.0.1:{server.server_port}/nbs/{p.name}') for p in sorted((site/'nbs').glob('*.html'))}
    server.shutdown()
    assert len(found)>30 and {k: v for k, v in found.items() if v}=={}

def test_search_and_dark_mode_work(site, browser):
    server = serve(site)
    page = browser.new_page(viewport=LOOKS['desktop'])
    page.goto(f'http://127.0.0.1:{server.server_port}/nbs/index.html')
    page.locator('#quarto-search input').fill('twin')
    page.wait_for_selector('.smalldocs-search-results a', timeout=30_000)
    assert page.locator('.smalldocs-search-results a').count()>0
    page.locator('.quarto-color-scheme-toggle').first.click()
    page.wait_for_function("() => document.documentElement.className.includes('quarto-dark')", timeout=30_000)
    server.shutdown()

def test_the_browser_check_sees_faults(tmp_path, browser):
    (tmp_path/'bad.html').write_text('<!doctype html><html><head><title>x</title></head><body><img src="no.png"><div style="width:3000px">wide</div><script>nothing()</script></body></html>')
    server = serve(tmp_path)
    found = '; '.join(faults_in_browser(browser, f'http://127.0.0.1:{server.server_port}/bad.html'))
    server.shutdown()
    for sign in ('scrolls sideways', 'nothing is not defined', 'image-alt', 'html-has-lang'): assert sign in found, found

if __name__=='__main__':                                            # the pictures of the site in `_docs`, to be looked at and committed
    with chromium() as b: take_pictures(b, ROOT/'_docs', SHOTS)

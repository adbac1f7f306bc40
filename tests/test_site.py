"The site as a visitor meets it: built in a copy, read by the checker, opened in a browser"
import functools, http.server, json, re, shutil, sys, threading
from collections import Counter
import pytest
from conftest import ROOT, copy_of_checkout, sh
from elbowsynth.site import check_site, read_bib

PROSE = sorted((ROOT/'nbs').glob('*.qmd'))

def test_the_bibliography_has_the_papers_sixty():
    refs = read_bib((ROOT/'nbs'/'references.bib').read_text(encoding='utf-8'))
    assert sorted(int(e['paper']) for e in refs.values() if 'paper' in e)==list(range(1, 61))
    assert all(e['author'] and e['title'] and re.fullmatch(r'\d{4}', e['year']) for e in refs.values())
    first = {e['paper']: (e['author'].split(',')[0].split(' and ')[0], e['year']) for e in refs.values() if 'paper' in e}
    assert (first['8'], first['21'], first['35'], first['45'], first['60'])==(('Gretton', '2012'), ('Gulrajani', '2017'), ('Gong', '2019'), ('Wang', '2004'), ('Zhou', '2022'))

def typed_numbers(text):
    "Decimal numbers in prose that stand for no place in the paper, version or formula"
    text = re.sub(r'```.*?```|`[^`\n]*`|\$\$.*?\$\$|\$[^$\n]+\$|\{\{[^}]*\}\}|^---.*?^---', ' ', text, flags=re.S|re.M)
    text = re.sub(r'Sections? [\d., and]+|FLUX\.1|Apache-2\.0|\]\([^)]*\)', ' ', text)
    return re.findall(r'\d*\.\d+|\d+\s?%|\b\d{2,}\b', text)

@pytest.mark.parametrize('path', [pytest.param(p, id=p.stem) for p in PROSE])
def test_no_number_is_typed(path): assert typed_numbers(path.read_text(encoding='utf-8'))==[]

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

def faults_in_browser(browser, url, shots=None):
    "What a visitor would stumble over: at desktop width in light and at phone width in dark, and the other way round"
    from axe_playwright_python.sync_playwright import Axe
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
        for v in Axe().run(page, options={'resultTypes': ['violations'], 'runOnly': ['wcag2a', 'wcag2aa', 'wcag21aa']}).response['violations']:
            if v['impact'] in ('serious', 'critical'): bad.append(f'{look} {scheme}: axe {v["id"]} ({v["impact"]}), {len(v["nodes"])} times, first {v["nodes"][0]["html"][:150]}')
        if shots: page.screenshot(path=shots/f'{url.rsplit("/", 1)[1][:-5]}-{look}-{scheme}.png')
        page.set_viewport_size(LOOKS[other])
        if page.evaluate(SIDEWAYS)>0: bad.append(f'{other} {scheme}: scrolls sideways by {page.evaluate(SIDEWAYS)}')
        context.close()
    return bad

@pytest.fixture(scope='module')
def browser():
    playwright = pytest.importorskip('playwright.sync_api', reason='playwright is not installed')
    chromium = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')
    if not chromium: pytest.skip('no chromium on PATH (on Debian: apt-get install chromium)')
    with playwright.sync_playwright() as p:
        b = p.chromium.launch(executable_path=chromium, args=['--no-sandbox', '--disable-gpu', '--disable-background-networking'])
        yield b
        b.close()

@pytest.mark.long('opens every page in a browser, two minutes')
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
    page.wait_for_selector('.smalldocs-search-results a', timeout=5000)
    assert page.locator('.smalldocs-search-results a').count()>0
    page.locator('.quarto-color-scheme-toggle').first.click()
    assert 'quarto-dark' in page.evaluate('document.documentElement.className')
    server.shutdown()

def test_the_browser_check_sees_faults(tmp_path, browser):
    (tmp_path/'bad.html').write_text('<!doctype html><html><head><title>x</title></head><body><img src="no.png"><div style="width:3000px">wide</div><script>nothing()</script></body></html>')
    server = serve(tmp_path)
    found = '; '.join(faults_in_browser(browser, f'http://127.0.0.1:{server.server_port}/bad.html'))
    server.shutdown()
    for sign in ('scrolls sideways', 'nothing is not defined', 'image-alt', 'html-has-lang'): assert sign in found, found

"The notebooks in JupyterLab: a stage alone, the table of its files, the start page, and what git sees afterwards"
import ast, builtins, copy, html, importlib, json, os, re, shutil, socket, subprocess, sys, time
import nbformat
import pytest
from conftest import ALL, ROOT, sh
from elbowsynth.core import LazyPackage
from elbowsynth.stages import start_page, start_stage, stage_files, stages

STAGES = stages(ROOT/'nbs')
FILTER = ROOT/'workflow'/'clean_notebook.py'

def source(cell): return ''.join(cell['source'])
def named(stage): return pytest.param(stage, id=stage.name)
def code_cells(path): return [c for c in json.loads(path.read_text(encoding='utf-8'))['cells'] if c['cell_type']=='code']
def is_parameters(cell): return 'parameters' in cell['metadata'].get('tags', [])
def has_flag(cell, flags): return re.search(rf'^#\|\s*({flags})\s*$', source(cell), re.M) is not None

def divided(path):
    "Code cells of a stage notebook above its parameters; its parameters cell and those below"
    cells = code_cells(path)
    first = next(i for i, c in enumerate(cells) if is_parameters(c))
    return cells[:first], cells[first:]

# The section Run without the cells above

def bound_names(cells):
    "Names that cells import, define or assign"
    names = set()
    for node in ast.walk(ast.parse('\n'.join(map(source, cells)))):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)): names.add(node.name)
        elif isinstance(node, ast.arg): names.add(node.arg)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store): names.add(node.id)
        elif isinstance(node, (ast.Import, ast.ImportFrom)): names |= {(a.asname or a.name).split('.')[0] for a in node.names}
    return names

@pytest.mark.parametrize('stage', [named(s) for s in STAGES])
def test_the_section_run_has_all_its_names(stage):
    "Its cells use what they define, and what the exported and hidden cells above define; nothing of an example"
    above, run = divided(stage.path)
    defining = [c for c in above if has_flag(c, 'exports?|hide')]
    used = {n.id for n in ast.walk(ast.parse('\n'.join(map(source, run)))) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
    assert used-bound_names(defining+run)-set(dir(builtins))-{'display'}==set()

@pytest.mark.parametrize('stage', [named(s) for s in STAGES])
def test_hidden_cells_of_stages_are_imports_and_settings(stage):
    "`run_definitions` runs them: no example or test is among them"
    for cell in divided(stage.path)[0]:
        if not has_flag(cell, 'hide'): continue
        body = ast.parse(source(cell)).body
        is_setting = len(body)==1 and isinstance(body[0], ast.Expr)
        assert is_setting or all(isinstance(o, (ast.Import, ast.ImportFrom)) for o in body), source(cell)

TOP = '''#| export
import json
from pathlib import Path
def double(numbers): return [factor*n for n in numbers]
factor = 2
with open('defined', 'a') as f: f.write('x')'''
EXAMPLE = "open('example', 'w').close()\nraise ValueError('an example')"
PARAMETERS = 'run: str = "_runs/x"  # Folder of the run\ndata: str = "raw"  # Reads: numbers\nout: str = "twice"  # Writes: twice the numbers\nn: int = 3  # Numbers'
START = "#| slow\nfrom elbowsynth.stages import stage_files, start_stage\nstarted = start_stage('twice', globals())"
WORK = "#| slow\no = root()/run/out\no.mkdir(parents=True, exist_ok=True)\n(o/'numbers.json').write_text(json.dumps(double(range(n))))"
END = '#| slow\nstage_files(started)'

@pytest.fixture
def toy(tmp_path, monkeypatch):
    "A checkout with one stage"
    top = tmp_path/'checkout'
    (top/'params').mkdir(parents=True)
    (top/'params'/'demo.yaml').write_text('all: {n: 4}')
    shutil.copy(ROOT/'settings.ini', top)
    cells = [nbformat.v4.new_code_cell(text) for text in (TOP, '#| hide\nfrom elbowsynth.core import root', EXAMPLE)]
    cells += [nbformat.v4.new_markdown_cell('## Run'), nbformat.v4.new_code_cell(PARAMETERS, metadata={'tags': ['parameters']})]
    cells += [nbformat.v4.new_code_cell(text) for text in (START, WORK, END)]
    (top/'nbs'/'1_data').mkdir(parents=True)
    nbformat.write(nbformat.v4.new_notebook(cells=cells), top/'nbs'/'1_data'/'01_twice.ipynb')
    monkeypatch.chdir(top)
    for name in ('PROFILE', 'RUN', 'DATA', 'RUNNER'): monkeypatch.delenv(f'ELBOWSYNTH_{name}', raising=False)
    monkeypatch.setenv('JPY_SESSION_NAME', 'x')
    return top

def run_in_kernel(path, top, cells):
    "Execute these cells of a notebook in a new kernel, as JupyterLab does; the notebook with its outputs"
    from nbclient import NotebookClient
    nb = nbformat.read(path, as_version=4)
    env = {k: v for k, v in os.environ.items() if not k.startswith('ELBOWSYNTH_')} | {'PYTHONPATH': str(ROOT), 'JPY_SESSION_NAME': 'x'}
    client = NotebookClient(nb, timeout=60, kernel_name='python3', resources={'metadata': {'path': str(path.parent)}})
    with client.setup_kernel(env=env):
        for i in cells: client.execute_cell(nb.cells[i], i)
    return nb

def printed(cell): return ''.join(o.text for o in cell.outputs if o.output_type=='stream')

def test_this_stage_only(toy):
    "From the heading Run to the end in a new kernel: defined once, no example, and a table at the end"
    path = toy/'nbs'/'1_data'/'01_twice.ipynb'
    nb = run_in_kernel(path, toy, range(4, 8))
    assert json.loads((toy/'_runs'/'demo'/'twice'/'numbers.json').read_text())==[0, 2, 4, 6]            # n of the profile
    assert (path.parent/'defined').read_text()=='x' and not (path.parent/'example').exists()
    assert 'The definitions in 01_twice.ipynb were run as they are saved; its examples and tests were not.' in printed(nb.cells[5])
    assert '1 json' in nb.cells[7].outputs[0].data['text/html']

def test_from_the_top_nothing_is_defined_twice(toy):
    path = toy/'nbs'/'1_data'/'01_twice.ipynb'
    nb = run_in_kernel(path, toy, [0, 1, 4, 5, 6, 7])
    assert (path.parent/'defined').read_text()=='x' and 'definitions' not in printed(nb.cells[5])
    assert json.loads((toy/'_runs'/'demo'/'twice'/'numbers.json').read_text())==[0, 2, 4, 6]

def variables_of(parameters):
    variables = {}
    exec(parameters, variables)
    return variables

def test_what_the_reader_has_defined_or_typed_is_kept(toy):
    "An edited value is used by the functions of the notebook, too"
    variables = variables_of(PARAMETERS.replace('= 3', '= 7')) | {'factor': 10}
    start_stage('twice', variables)
    assert variables['double']([1])==[10] and variables['n']==7 and variables['run']=='_runs/demo'

@pytest.mark.parametrize('runner', [True, False])
def test_papermill_gets_what_it_has_set(toy, monkeypatch, runner):
    "By the runner, or by papermill itself after the cells above: no variable changes"
    monkeypatch.delenv('JPY_SESSION_NAME')
    variables = variables_of(PARAMETERS) | {'n': 5}
    if runner: monkeypatch.setenv('ELBOWSYNTH_RUNNER', '1')
    else: variables['In'] = [TOP, '#| hide\nfrom elbowsynth.core import root', '# Parameters\nn = 5']
    before = dict(variables)
    start_stage('twice', variables)
    assert variables==before and not (toy/'defined').exists()

# What a stage has read, written and skipped

def table_rows(shown):
    "Texts of the cells of a table"
    rows = [re.findall(r'<td[^>]*>(.*?)</td>', row) for row in re.findall(r'<tr>(.*?)</tr>', shown.data)]
    return [row for row in rows if row]

def write(path, text=''):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)

@pytest.fixture
def reading_stage(toy):
    "A stage that reads folders of all kinds"
    lines = ['run: str = "_runs/r"  # Folder of the run', 'data: str = "raw"  # Reads: images & labels.csv', 'models: list = ["gan", "sdxl"]  # Reads: samples',
             'best: str = ""  # Reads: values of the search', 'out: str = "scores"  # Writes: scores', 'n: int = 3  # Number']
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell('\n'.join(lines), metadata={'tags': ['parameters']})])
    nbformat.write(nb, toy/'nbs'/'1_data'/'02_score.ipynb')
    return variables_of('\n'.join(lines))

def test_the_table_says_what_was_read_written_kept_and_skipped(toy, reading_stage, monkeypatch):
    monkeypatch.setenv('ELBOWSYNTH_RUNNER', '1')
    run = toy/'_runs'/'r'
    for name in ('raw/a.png', 'raw/b.PNG', 'raw/labels.csv', 'raw/.part', 'gan/samples/1.png', 'scores/old.csv', 'scores/again.csv'): write(run/name)
    started = start_stage('score', reading_stage)
    write(run/'scores'/'again.csv', 'longer')
    write(run/'scores'/'figures'/'new.svg')
    write(run/'scores'/'stage.json')                                                                    # the runner's
    write(run/'scores'/'rejects.csv', 'file,reason\na.png,"no\nimage"\nb.png,small\n')
    shown = stage_files(started)
    assert table_rows(shown)==[
        ['read', 'raw', 'images &amp; labels.csv', '2 png, 1 csv'], ['read', 'gan', 'samples', '1 png'], ['skipped', 'sdxl', 'samples', 'no such folder'],
        ['not used', 'best', 'values of the search', ''], ['written now', 'scores', 'scores', '2 csv, 1 svg'],
        ['kept', 'scores', 'files of an earlier run of this stage', '1 csv'], ['skipped', 'scores/rejects.csv', 'rejected files', '2 files']]
    assert 'The report of this study is _runs/r/report.html' in shown.data and '<a ' not in shown.data
    monkeypatch.delenv('ELBOWSYNTH_RUNNER')                                                             # in JupyterLab
    assert 'no report yet' in stage_files(started).data and '<a ' not in stage_files(started).data
    write(run/'report.html')
    assert 'href="../../_runs/r/report.html"' in stage_files(started).data

def test_names_are_escaped_and_paths_of_the_machine_are_not_shown(toy, reading_stage, monkeypatch):
    monkeypatch.setenv('ELBOWSYNTH_RUNNER', '1')
    mine = toy/'private'/'my <b>images'
    write(mine/'a.png')
    shown = stage_files(start_stage('score', reading_stage | {'data': str(mine), 'models': ['<img src=x>']})).data
    assert 'my &lt;b&gt;images (your folder)' in shown and 'private' not in shown and '&lt;img' in shown and '<img' not in shown

# The start page

def test_the_start_page_leads_to_stages_runs_and_reports(toy):
    runs = toy/'_runs'
    write(runs/'demo'/'plan.json', json.dumps({'jobs': [{'out': 'twice'}, {'out': 'scores'}]}))
    write(runs/'demo'/'twice'/'stage.json')
    write(runs/'demo'/'notebooks'/'01_twice.ipynb')
    write(runs/'demo'/'logs'/'1 twice.log')
    write(runs/'a"<b>'/'report.html')
    write(runs/'damaged'/'plan.json', '[')
    write(runs/'.cache'/'data.json')
    write(runs/'demo'/'.ipynb_checkpoints'/'plan.json')
    shown = start_page(toy).data
    links = [html.unescape(link) for link in re.findall(r'href="([^"]*)"', shown)]
    assert sorted(links)==sorted(['1_data/01_twice.ipynb#Run', '../_runs/demo/notebooks/01_twice.ipynb', '../_runs/demo/logs/1%20twice.log', '../_runs/a%22%3Cb%3E/report.html'])
    assert '1 of 2 stages finished' in shown and 'plan.json is damaged' in shown and '<b>' not in shown and 'finished</td>' in shown

def test_the_front_page_calls_it_and_readers_elsewhere_do_not_see_it():
    calls = [c for c in code_cells(ROOT/'nbs'/'index.ipynb') if 'start_page()' in source(c)]
    assert len(calls)==1 and has_flag(calls[0], 'hide') and calls[0]['outputs']==[]
    assert 'start_page' not in (ROOT/'README.md').read_text(encoding='utf-8')

def test_the_file_browser_begins_at_the_checkout(tmp_path):
    planned = sh('make', '-n', '-o', 'install', 'lab').stdout
    assert f'--ServerApp.root_dir="{ROOT}"' in planned and 'nbs/index.ipynb' in planned

# What git sees

def clean_filter():
    spec = importlib.util.spec_from_file_location('clean_notebook', FILTER)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

def as_bytes(nb): return (json.dumps(nb, sort_keys=True, indent=1, ensure_ascii=False)+'\n').encode()

def committed_notebook():
    "A notebook as this repository has them: sources are texts"
    stream = {'name': 'stdout', 'output_type': 'stream', 'text': 'é 1\n2\n'}
    code = [{'cell_type': 'code', 'execution_count': None, 'id': f'c{i}', 'metadata': {}, 'outputs': [stream] if i==1 else [], 'source': text}
            for i, text in enumerate(('#| slow\nrun()', 'print(1)\nprint(2)', 'n: int = 3'))]
    code[2]['metadata'] = {'tags': ['parameters']}
    text = {'cell_type': 'markdown', 'id': 'm', 'metadata': {}, 'source': '# Title\n> Words'}
    return {'cells': [text, *code], 'metadata': {'kernelspec': {'name': 'python3'}}, 'nbformat': 4, 'nbformat_minor': 5}

def as_jupyterlab_saves(nb):
    "After a run: lists of lines, execution counts, new outputs, other metadata"
    nb = copy.deepcopy(nb)
    for i, cell in enumerate(nb['cells']):
        cell['source'] = cell['source'].splitlines(True)
        if cell['cell_type']!='code': continue
        cell['metadata']['execution'] = {'iopub.status.busy': '2030-01-01'}
        result = {'output_type': 'execute_result', 'execution_count': i, 'metadata': {}, 'data': {'text/plain': ['<a at 0x1\n', '>']}}
        cell |= {'execution_count': i, 'outputs': [result]}
    nb['metadata']['language_info'] = {'version': '3.12'}
    return nb

def test_a_notebook_that_was_only_run_is_the_committed_one():
    old = committed_notebook()
    assert clean_filter().clean(as_bytes(as_jupyterlab_saves(old)), as_bytes(old))==as_bytes(old)

def test_a_changed_cell_is_the_only_difference():
    old = committed_notebook()
    new = as_jupyterlab_saves(old)
    new['cells'][0]['source'] = ['# Title\n', '> Other words']
    new['cells'][1]['source'] = ['#| slow\n', 'run(2)']
    new['cells'][2]['source'] = ['print(3)']
    expected = copy.deepcopy(old)
    expected['cells'][0]['source'], expected['cells'][1]['source'], expected['cells'][2]['source'] = '# Title\n> Other words', '#| slow\nrun(2)', 'print(3)'
    expected['cells'][2]['outputs'] = [{'output_type': 'execute_result', 'execution_count': None, 'metadata': {}, 'data': {'text/plain': '<a at 0x1\n>'}}]
    assert json.loads(clean_filter().clean(as_bytes(new), as_bytes(old)))==expected

def test_added_moved_deleted_and_tagged_cells_are_changes():
    old = committed_notebook()
    added = {'cell_type': 'code', 'id': 'new', 'source': [], 'metadata': {'trusted': True}, 'outputs': [], 'execution_count': 9}
    def cleaned(change):
        new = as_jupyterlab_saves(old)
        change(new['cells'])
        return json.loads(clean_filter().clean(as_bytes(new), as_bytes(old)))['cells']
    assert [c['id'] for c in cleaned(lambda cells: cells.reverse())]==['c2', 'c1', 'c0', 'm']
    assert cleaned(lambda cells: cells.reverse())[::-1]==old['cells']
    assert cleaned(lambda cells: cells.pop(1))==[old['cells'][0], *old['cells'][2:]]
    assert cleaned(lambda cells: cells.append(added))==[*old['cells'], added | {'source': '', 'metadata': {}, 'execution_count': None}]
    untagged = cleaned(lambda cells: cells[3]['metadata'].pop('tags'))
    assert untagged[3]['metadata']=={} and untagged[:3]==old['cells'][:3]

def git(top, *args, check=True):
    identity = ['-c', 'user.name=x', '-c', 'user.email=x@example.org', '-c', 'commit.gpgsign=false', '-c', 'init.defaultBranch=main']
    env = {k: v for k, v in os.environ.items() if not k.startswith('GIT_')}
    done = subprocess.run(['git', *identity, *map(str, args)], cwd=top, capture_output=True, text=True, env=env)
    assert not check or done.returncode==0, done.stderr
    return done

@pytest.fixture
def clones(tmp_path):
    "A repository with two notebooks, and a clone of it as `make lab` configures it"
    if not shutil.which('git'): pytest.skip('no git on PATH')
    first, clone = tmp_path/'first', tmp_path/'a clone'
    (first/'workflow').mkdir(parents=True)
    shutil.copy(FILTER, first/'workflow')
    shutil.copy(ROOT/'.gitattributes', first)
    (first/'nbs').mkdir()
    for name in ('a', "b's $HOME"): (first/'nbs'/f'{name}.ipynb').write_bytes(as_bytes(committed_notebook()))
    git(first, 'init', '-q')
    git(first, 'add', '-A')
    git(first, 'commit', '-q', '-m', 'one')
    git(tmp_path, 'clone', '-q', first, clone)
    command, = re.findall(r"git config --local (\S+) '\S*python (workflow/clean_notebook.py %f)'", (sh('make', '-n', '-o', 'install', 'lab').stdout))
    git(clone, 'config', '--local', command[0], f'{sys.executable} {command[1]}')
    return first, clone

def test_notebooks_that_were_run_do_not_block_a_pull(clones):
    first, clone = clones
    paths = sorted((clone/'nbs').glob('*.ipynb'))
    assert len(paths)==2
    for path, saved_by in zip(paths, ('JupyterLab', 'another editor')):
        path.write_bytes(as_bytes(as_jupyterlab_saves(committed_notebook())))
        assert git(clone, 'status', '--short', path).stdout and git(clone, 'diff', path).stdout==''     # the size has changed
        if saved_by=='JupyterLab': clean_filter().after_save(str(path), {'type': 'notebook'}, None)
        else: sh(sys.executable, 'workflow/clean_notebook.py', cwd=clone)
        assert git(clone, 'status', '--short', path).stdout==''
    changed = committed_notebook()
    changed['cells'][2]['source'] = 'print(12)'
    (first/'nbs'/'a.ipynb').write_bytes(as_bytes(changed))
    git(first, 'commit', '-q', '-a', '-m', 'two')
    pulled = git(clone, 'pull', '-q', '--ff-only')
    assert pulled.stderr=='' and json.loads((clone/'nbs'/'a.ipynb').read_text())==changed
    assert git(clone, 'status', '--short').stdout==''

def test_an_edited_notebook_commits_its_edit_only(clones):
    clone, new = clones[1], as_jupyterlab_saves(committed_notebook())
    new['cells'][3]['source'] = ['n: int = 4']
    new['cells'][3]['outputs'] = []
    (clone/'nbs'/'a.ipynb').write_bytes(as_bytes(new))
    lines = [line for line in git(clone, 'diff', '-U0').stdout.splitlines() if re.match('[-+] ', line)]
    assert lines==['-   "source": "n: int = 3"', '+   "source": "n: int = 4"']
    git(clone, 'commit', '-q', '-a', '-m', 'edit')
    expected = committed_notebook()
    expected['cells'][3]['source'] = 'n: int = 4'
    assert git(clone, 'show', 'HEAD:nbs/a.ipynb').stdout.encode()==as_bytes(expected)
    assert (clone/'nbs'/'a.ipynb').read_bytes()==as_bytes(new)                                          # the working copy stays

def test_new_outputs_are_committed_on_purpose(clones):
    "As `make prepare OUTPUTS=FILE` does it, also after git has found no difference"
    clone, new = clones[1], committed_notebook()
    new['cells'][2]['outputs'] = []
    (clone/'nbs'/'a.ipynb').write_bytes(as_bytes(new))
    sh(sys.executable, 'workflow/clean_notebook.py', cwd=clone)
    assert git(clone, 'status', '--short').stdout==''
    planned = sh('make', '-n', '-o', 'install', 'prepare', 'OUTPUTS=nbs/a.ipynb').stdout
    command = re.search(r'git (-c filter.*? nbs/a.ipynb)', planned)[1].split()
    git(clone, *command)
    git(clone, 'commit', '-q', '-m', 'outputs')
    assert git(clone, 'show', 'HEAD:nbs/a.ipynb').stdout.encode()==as_bytes(new)

def test_an_edit_is_not_staged_by_saving_it(clones):
    "Nor is anything if the filter is not configured, or outside of git"
    clone, new = clones[1], committed_notebook()
    path, save = clone/'nbs'/'a.ipynb', clean_filter().after_save
    new['cells'][3]['source'] = 'n: int = 4'
    path.write_bytes(as_bytes(new))
    save(str(path), {'type': 'notebook'}, None)
    assert git(clone, 'status', '--short').stdout==' M nbs/a.ipynb\n'
    path.write_bytes(as_bytes(as_jupyterlab_saves(committed_notebook())))
    git(clone, 'config', '--local', '--unset', 'filter.elbowsynth-notebook.clean')
    save(str(path), {'type': 'notebook'}, None)
    assert git(clone, 'status', '--short').stdout==' M nbs/a.ipynb\n'
    (clone/'.git').rename(clone.parent/'git')
    save(str(path), {'type': 'notebook'}, None)
    save(str(path), {'type': 'file'}, None)

@pytest.mark.parametrize('text', ['<<<<<<< HEAD\n{', '{"cells": [{}]}', '[]', ''])
def test_a_damaged_notebook_is_not_lost(clones, text):
    clone = clones[1]
    (clone/'nbs'/'a.ipynb').write_text(text)
    added = git(clone, 'add', 'nbs/a.ipynb')
    assert git(clone, 'show', ':nbs/a.ipynb').stdout==text and 'nbs/a.ipynb is no readable notebook' in added.stderr

def test_a_filter_that_cannot_run_loses_nothing(clones):
    "`.venv` was removed: git commits the file as it is"
    clone, new = clones[1], as_bytes(as_jupyterlab_saves(committed_notebook()))
    git(clone, 'config', '--local', 'filter.elbowsynth-notebook.clean', '.venv/bin/python workflow/clean_notebook.py %f')
    (clone/'nbs'/'a.ipynb').write_bytes(new)
    git(clone, 'add', 'nbs/a.ipynb')
    assert git(clone, 'show', ':nbs/a.ipynb').stdout.encode()==new

def test_a_conflict_can_be_resolved(clones):
    first, clone = clones
    for top, value in ((first, 5), (clone, 6)):
        nb = committed_notebook()
        nb['cells'][3]['source'] = f'n: int = {value}'
        (top/'nbs'/'a.ipynb').write_bytes(as_bytes(nb))
        git(top, 'commit', '-q', '-a', '-m', f'{value}')
    assert git(clone, 'pull', '-q', '--no-rebase', '--no-edit', check=False).returncode!=0
    resolved = as_jupyterlab_saves(committed_notebook())
    resolved['cells'][3]['source'] = ['n: int = 7']
    (clone/'nbs'/'a.ipynb').write_bytes(as_bytes(resolved))
    git(clone, 'commit', '-q', '-a', '-m', 'resolved')
    cells = json.loads(git(clone, 'show', 'HEAD:nbs/a.ipynb').stdout)['cells']
    assert cells[3]['source']=='n: int = 7' and cells[:3]==committed_notebook()['cells'][:3]

def test_each_notebook_of_this_repository_passes_unchanged():
    "Formats of all notebooks: what JupyterLab saves is the committed file again"
    module = clean_filter()
    for path in sorted((ROOT/'nbs').rglob('*.ipynb')):
        if '.ipynb_checkpoints' in path.parts: continue
        text = path.read_bytes()
        nb = json.loads(text)
        for cell in nb['cells']: cell['source'] = module.joined(cell['source'])
        new = as_jupyterlab_saves(nb)
        assert module.clean(as_bytes(new), text)==text, path.name
        new['cells'].append({'cell_type': 'markdown', 'id': 'appended', 'metadata': {}, 'source': ['x']})
        added = module.clean(as_bytes(new), text).decode().splitlines()
        assert len(added)-len(text.decode().splitlines())==6, path.name                                 # the cell's lines

def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]

def request(port, path, body=None):
    "The answer of the server, once it runs"
    import urllib.error, urllib.request
    data, method = (None, 'GET') if body is None else (json.dumps(body).encode(), 'PUT')
    for _ in range(300):
        try: return json.load(urllib.request.urlopen(urllib.request.Request(f'http://127.0.0.1:{port}/{path}', data, method=method)))
        except urllib.error.HTTPError as error: pytest.fail(error.read().decode())
        except urllib.error.URLError: time.sleep(.1)
    pytest.fail('the server did not start')

@pytest.mark.long('a JupyterLab server, 8 s')
def test_make_lab_serves_the_checkout_and_a_save_is_no_change(clones, tmp_path):
    "The server of JupyterLab, as `make lab` starts it; a run notebook is saved as the browser does it"
    clone, port = clones[1], free_port()
    git(clone, 'config', '--local', '--unset', 'filter.elbowsynth-notebook.clean')
    shutil.copy(ROOT/'Makefile', clone)
    shutil.copy(clone/'nbs'/'a.ipynb', clone/'nbs'/'index.ipynb')
    (clone/'_runs'/'demo').mkdir(parents=True)
    settings = {'ServerApp': {'port': port, 'port_retries': 0, 'allow_root': True, 'disable_check_xsrf': True}, 'IdentityProvider': {'token': ''}}
    (tmp_path/'jupyter').mkdir()
    (tmp_path/'jupyter'/'jupyter_server_config.json').write_text(json.dumps(settings))
    env = {k: v for k, v in os.environ.items() if not k.startswith(('JUPYTER', 'JPY'))}
    env |= {'JUPYTER_CONFIG_DIR': str(tmp_path/'jupyter'), 'JUPYTER_RUNTIME_DIR': str(tmp_path/'runtime'), 'HOME': str(tmp_path), 'BROWSER': 'true'}
    command = ['make', '-o', 'install', 'lab', f'IN={os.path.dirname(sys.executable)}/']
    with (tmp_path/'log').open('w') as log:
        lab = subprocess.Popen(command, cwd=clone, env=env, stdout=log, stderr=log, start_new_session=True)
    try:
        names = [entry['name'] for entry in request(port, 'api/contents')['content']]
        assert {'_runs', 'nbs', 'workflow'}<=set(names), names
        saved = as_jupyterlab_saves(committed_notebook())
        request(port, 'api/contents/nbs/a.ipynb', {'type': 'notebook', 'format': 'json', 'content': saved})
        assert json.loads((clone/'nbs'/'a.ipynb').read_text())['cells'][2]['outputs']==saved['cells'][2]['outputs']    # kept for the reader
        assert git(clone, 'status', '--short', 'nbs/a.ipynb').stdout==''
    finally:
        os.killpg(lab.pid, 15)
        lab.wait(30)
    assert 'hook' not in (tmp_path/'log').read_text()

"The rules that keep the notebooks readable, exportable and runnable by papermill"
import ast, io, json, re, shutil, tokenize
from collections import Counter
from pathlib import Path
import numpy as np
import pytest
from conftest import ROOT, sh
from elbowsynth.stages import stages
from elbowsynth.run import imported_modules

NOTEBOOKS = sorted((ROOT/'nbs').glob('*.ipynb'))
LIBRARY = sorted(p for p in (ROOT/'elbowsynth').glob('*.py') if not p.name.startswith('_'))
STAGES = [s.path for s in stages(ROOT/'nbs')]

def cells(path, kind='code'): return [c for c in json.loads(path.read_text(encoding='utf-8'))['cells'] if c['cell_type']==kind]
def source(cell): return ''.join(cell['source'])
def flagged(cell, flag): return re.search(rf'^#\|\s*{flag}\b', source(cell), re.M) is not None
def tags(cell): return cell['metadata'].get('tags', [])
def named(path): return pytest.param(path, id=path.stem)
def exports(path): return any(flagged(c, 'default_exp') for c in cells(path))      # the others are pages only

def bound(tree):
    "Names that a cell binds at its top level; `for` targets and names with an underscore are free"
    for o in tree.body:
        if isinstance(o, (ast.FunctionDef, ast.ClassDef)): yield o.name
        elif isinstance(o, (ast.Import, ast.ImportFrom)): yield from ((a.asname or a.name.split('.')[0]) for a in o.names)
        elif isinstance(o, (ast.Assign, ast.AnnAssign)):
            for t in (o.targets if isinstance(o, ast.Assign) else [o.target]): yield from (n.id for n in ast.walk(t) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store))
        elif isinstance(o, ast.With): yield from (n.optional_vars.id for n in o.items if isinstance(n.optional_vars, ast.Name) and n.optional_vars.id!='part')

def rebound(path):
    return [n for n, k in Counter(n for c in cells(path) for n in bound(ast.parse(source(c)))).items() if k>1 and not n.startswith('_') and n!='fig']

def stage_faults(path):
    "What is wrong with the end of a stage notebook: its parameters and all below"
    code = cells(path)
    at = [i for i, c in enumerate(code) if 'parameters' in tags(c)]
    if len(at)!=1: return [f'{len(at)} cells tagged parameters']
    text, bad = source(code[at[0]]), []
    lines = ast.parse(text).body
    comments = {t.start[0] for t in tokenize.generate_tokens(io.StringIO(text).readline) if t.type==tokenize.COMMENT}
    bad += [f'parameters: {ast.unparse(o)} is no annotated literal' for o in lines if not isinstance(o, ast.AnnAssign)]
    bad += [f'parameters: {ast.unparse(o)} has no comment' for o in lines if o.end_lineno not in comments]
    bad += [f'cell {i}: exports below the parameters' for i, c in enumerate(code[at[0]:]) if flagged(c, 'exports?')]
    bad += [f'not flagged slow below the parameters: {source(c)[:40]!r}' for c in code[at[0]+1:] if not flagged(c, 'slow')]
    bad += [f'flagged slow above the parameters: {source(c)[:40]!r}' for c in code[:at[0]] if flagged(c, 'slow')]
    names = {o.target.id for o in lines if isinstance(o, ast.AnnAssign)}
    bad += [f'no parameter {n}' for n in {'run', 'out'}-names]
    bad += ['no cell asks for the profile'] if not any('lab_profile' in source(c) for c in code[at[0]:]) else []
    exported = [o for c in code if flagged(c, 'exports?') for o in ast.walk(ast.parse(source(c))) if isinstance(o, (ast.FunctionDef, ast.ClassDef))]
    for f in exported:
        if isinstance(f, ast.FunctionDef):
            used = {n.id for d in f.args.defaults+[d for d in f.args.kw_defaults if d] for n in ast.walk(d) if isinstance(n, ast.Name)}
            bad += [f'{f.name}: a default hangs on the parameter {n}' for n in used & names]
    return bad

@pytest.mark.parametrize('path', [named(p) for p in STAGES])
def test_stage_ends_as_papermill_needs_it(path): assert stage_faults(path)==[]

def test_stage_rules_see_faults(tmp_path):
    code = lambda text, tag=(): {'cell_type': 'code', 'source': text, 'metadata': {'tags': list(tag)}, 'outputs': []}
    bad = [code('#| export\ndef f(n=epochs): return n'), code('epochs: int = 3\nrun: str = "x"  # Folder', ['parameters']), code('#| export\ndef g(): pass'), code('train()')]
    (tmp_path/'01_bad.ipynb').write_text(json.dumps({'cells': bad}))
    text = '; '.join(stage_faults(tmp_path/'01_bad.ipynb'))
    for fault in ('epochs: int = 3 has no comment', 'exports below', "not flagged slow below the parameters: 'train()'", 'no parameter out', 'a default hangs on the parameter epochs', 'asks for the profile'):
        assert fault in text
    twice = [code('x = 1'), code('def x(): pass'), code('for i in []: pass'), code('i = 2')]
    (tmp_path/'02_twice.ipynb').write_text(json.dumps({'cells': twice}))
    assert rebound(tmp_path/'02_twice.ipynb')==['x']

@pytest.mark.parametrize('path', [named(p) for p in NOTEBOOKS])
def test_names_are_bound_once(path): assert rebound(path)==[]

@pytest.mark.parametrize('path', [named(p) for p in NOTEBOOKS])
def test_no_traces_in_outputs(path):
    nb = json.loads(path.read_text(encoding='utf-8'))
    assert not {'widgets', 'papermill'} & set(nb['metadata'])
    for c in cells(path):
        assert c['execution_count'] is None and 'papermill' not in c['metadata']
        texts = json.dumps([{k: v for k, v in o.items() if k!='data'} | {'data': {m: t for m, t in o.get('data', {}).items() if m.startswith('text/')}} for o in c['outputs']])
        assert not re.search(r'/(home|tmp|root|work|Users|var)/', texts), texts[:300]
        assert not re.search(r'\b\d\d:\d\d:\d\d\b| at 0x[0-9a-f]{6}|application/vnd.jupyter.widget', texts), texts[:300]
        assert not any(o['output_type']=='error' for o in c['outputs'])
        assert len(json.dumps(c['outputs']))<150_000

@pytest.mark.parametrize('path', [named(p) for p in [p for p in NOTEBOOKS if p.stem!='index']])
def test_reads_as_a_page(path):
    if exports(path): assert source(cells(path)[0]).startswith(f'#| default_exp {path.stem.split("_", 1)[1]}')
    else: assert not any(flagged(c, 'exports?') for c in cells(path))
    head = source(cells(path, 'markdown')[0])
    assert re.fullmatch(r'# [^\n]+\n> [^\n]+', head), head
    for c in cells(path):
        text = source(c)
        assert 'nbdev_export(' not in text and not re.search(r'^\s*[!%]', text, re.M), text
        kinds = {isinstance(o, (ast.Import, ast.ImportFrom)) for o in ast.parse(text).body}
        assert kinds!={True, False} or flagged(c, 'slow'), f'imports stand in cells of their own:\n{text}'

def test_exported_cells_are_short():
    n = sorted(len(source(c).splitlines()) for p in NOTEBOOKS for c in cells(p) if flagged(c, 'exports?'))
    assert n[-1]<=60 and np.percentile(n, 90)<=25, (n[-1], np.percentile(n, 90))

def test_functions_have_one_home():
    homes = Counter(o.name for p in LIBRARY for o in ast.parse(p.read_text()).body if isinstance(o, ast.FunctionDef) and o.name!='main')
    assert [n for n, k in homes.items() if k>1]==[]

def test_each_module_has_its_notebook():
    for p in LIBRARY:
        notebook = re.search(r'File to edit: \.\./nbs/(\S+\.ipynb)', p.read_text())[1]
        assert (ROOT/'nbs'/notebook).exists()
    assert {p.stem for p in LIBRARY}=={p.stem.split('_', 1)[1] for p in NOTEBOOKS if exports(p)}

# The picture of the library: what each module may import. An arrow goes to a lower number, but for `search`, which scores as `metrics` does.
IMPORTS = {'core': '', 'data': 'core', 'anatomy': 'data', 'phantom': 'core data anatomy', 'preprocess': 'core data', 'masks': 'core data preprocess',
           'importers': 'core data masks', 'split': 'core data',
           'training': 'core data', 'gan': 'core data training', 'wgan_gp': 'core data training gan', 'ac_gan': 'core data training gan',
           'tac_gan': 'core data training gan ac_gan', 'search': 'core data training gan ac_gan tac_gan metrics',
           'sizes': '', 'adafactor': '', 'latents': 'core data training', 'inpaint': 'core data masks training sizes adafactor latents', 'sdxl': 'inpaint',
           'flux': 'data inpaint', 'bases': 'core data phantom preprocess training latents inpaint sdxl flux',
           'extractors': 'core', 'floors': '', 'metrics': 'core data extractors floors', 'stats': 'core', 'conventions': '', 'sensitivity': '',
           'figures': 'core data', 'tables': 'core data ac_gan tac_gan wgan_gp figures inpaint', 'claims': 'figures tables',
           'teach': 'core data extractors figures flux latents metrics phantom preprocess sdxl stats training', 'ablation': 'core figures sdxl stats teach',
           'run': 'core', 'site': 'core claims tables'}

def test_imports_go_one_way():
    for p in LIBRARY:
        found = imported_modules(p.read_text())
        assert found<=set(IMPORTS[p.stem].split()), f'{p.stem} imports {found-set(IMPORTS[p.stem].split())}'
    assert imported_modules((ROOT/'elbowsynth'/'tac_gan.py').read_text())>={'ac_gan', 'gan', 'training'}            # it does see them

def test_ruff():
    sh('ruff', 'check', '--no-cache', '--isolated', '--select', 'F821,F401', '--per-file-ignores', '_modidx.py:F401', 'elbowsynth')

def test_clean_and_export_leave_no_difference(tmp_path):
    names = ('nbs', 'elbowsynth', 'settings.ini', 'setup.py', 'README.md', '_quarto.yml')
    for n in names:
        if (ROOT/n).is_dir(): shutil.copytree(ROOT/n, tmp_path/n, ignore=shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints'))
        else: shutil.copy(ROOT/n, tmp_path/n)
    state = lambda: {p.relative_to(tmp_path): p.read_bytes() for n in ('nbs', 'elbowsynth', 'README.md') for p in ([tmp_path/n] if (tmp_path/n).is_file() else (tmp_path/n).iterdir()) if p.is_file()}
    before = state()
    for command in (['nbdev_clean'], ['nbdev_export'], ['python', '-m', 'elbowsynth.site', '--readme']): sh(*command, cwd=tmp_path, PYTHONPATH=str(tmp_path))
    after = state()
    assert [str(p) for p in after if after[p]!=before.get(p)]==[]

def test_cells_hold():
    sh('nbdev_test', '--n_workers', '2', '--do_print')

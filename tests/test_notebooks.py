"The rules that keep the notebooks readable, exportable and runnable by papermill"
import ast, io, json, re, shutil, tokenize
from collections import Counter
import numpy as np
import pytest
from conftest import ROOT, sh
from elbowsynth.run import dependencies
from elbowsynth.staleness import imported_modules
from elbowsynth.stages import stages

NBS, LIBRARY = ROOT/'nbs', ROOT/'elbowsynth'
NOTEBOOKS = sorted(p for p in NBS.rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts)
NUMBERED = [p for p in NOTEBOOKS if p.stem!='index']
MODULES = sorted(p for p in LIBRARY.rglob('*.py') if not p.name.startswith('_') and 'tiny' not in p.parts)
STAGES = stages(NBS)

# Reading notebooks

def cells(path, kind='code'): return [c for c in json.loads(path.read_text(encoding='utf-8'))['cells'] if c['cell_type']==kind]
def source(cell): return ''.join(cell['source'])
def flagged(cell, flag): return re.search(rf'^#\|\s*{flag}\b', source(cell), re.M) is not None
def is_exported(cell): return flagged(cell, 'exports?')
def tags(cell): return cell['metadata'].get('tags', [])
def named(path): return pytest.param(path, id=path.stem)
def makes_a_module(path): return any(flagged(c, 'default_exp') for c in cells(path))      # the others are pages only
def exported_cells(path): return [source(c) for c in cells(path) if is_exported(c)]
def write_notebook(path, *sources):
    "A notebook of code cells; the source of a parameters cell is a tuple"
    code = []
    for s in sources:
        text, cell_tags = (s[0], ['parameters']) if isinstance(s, tuple) else (s, [])
        code.append({'cell_type': 'code', 'id': str(len(code)), 'source': text, 'metadata': {'tags': cell_tags}, 'outputs': []})
    path.write_text(json.dumps({'cells': code}))
    return path

def test_notebooks_and_modules_are_seen():
    "The tests below have something to look at"
    assert len(NUMBERED)>=50 and len(MODULES)>=50 and len(STAGES)>=14
    assert {'core', 'masks', 'flux', 'ablation', 'site'}<={p.stem for p in MODULES}

# Numbers and folders

def number(path): return int(path.name.split('_')[0])

def test_no_two_notebooks_have_one_number():
    counts = Counter(number(p) for p in NUMBERED)
    assert [n for n, k in counts.items() if k>1]==[]

def test_folders_are_numbered_and_in_the_order_of_their_notebooks():
    for p in NUMBERED: assert re.fullmatch(r'\d_[a-z]+', p.parent.name) and p.parent.parent==NBS, p
    by_number = [p.parent.name for p in sorted(NUMBERED, key=number)]
    assert by_number==sorted(by_number)

def test_numbers_rise_along_the_graph_of_stages():
    numbers = {s.name: number(s.path) for s in STAGES}
    graph = dependencies({s.name: s.defaults for s in STAGES})
    assert graph['masks'] and graph['metrics'], 'no dependencies seen'
    for stage, needed in graph.items():
        for other in needed: assert numbers[other]<numbers[stage], f'{stage} reads {other}'

# Stage notebooks

def parameter_errors(code, first):
    "Faults of the parameters cell"
    text = source(code[first])
    lines = ast.parse(text).body
    comments = {t.start[0] for t in tokenize.generate_tokens(io.StringIO(text).readline) if t.type==tokenize.COMMENT}
    errors = [f'parameters: {ast.unparse(o)} is not an annotated literal' for o in lines if not isinstance(o, ast.AnnAssign)]
    errors += [f'parameters: {ast.unparse(o)} has no comment' for o in lines if o.end_lineno not in comments]
    names = {o.target.id for o in lines if isinstance(o, ast.AnnAssign)}
    errors += [f'no parameter {n}' for n in sorted({'run', 'out'}-names)]
    exported = [o for c in code if is_exported(c) for o in ast.walk(ast.parse(source(c))) if isinstance(o, ast.FunctionDef)]
    for f in exported:
        defaults = f.args.defaults+[d for d in f.args.kw_defaults if d]
        used = {n.id for d in defaults for n in ast.walk(d) if isinstance(n, ast.Name)}
        errors += [f'{f.name}: a default value uses the parameter {n}' for n in used & names]
    return errors

def stage_errors(path):
    "Faults at the end of a stage notebook: its parameters and all below"
    code = cells(path)
    tagged = [i for i, c in enumerate(code) if 'parameters' in tags(c)]
    if len(tagged)!=1: return [f'{len(tagged)} cells tagged parameters']
    first = tagged[0]
    errors = parameter_errors(code, first)
    errors += [f'cell {i}: exports below the parameters' for i, c in enumerate(code[first:]) if is_exported(c)]
    errors += [f'not flagged slow below the parameters: {source(c)[:40]!r}' for c in code[first+1:] if not flagged(c, 'slow')]
    errors += [f'flagged slow above the parameters: {source(c)[:40]!r}' for c in code[:first] if flagged(c, 'slow')]
    return errors+run_section_errors(path)

RUN_ONLY = ('**Run this stage only:** click the heading "Run", then choose *Run > Run Selected Cell and All Below* in JupyterLab; '
            'the cells above need not have run.')

def run_section_errors(path):
    "Faults of the section Run: heading, parameters, start, work, table of the files"
    all_cells = json.loads(path.read_text(encoding='utf-8'))['cells']
    first = next(i for i, c in enumerate(all_cells) if 'parameters' in tags(c))
    heading, last = all_cells[max(0, first-1)], all_cells[-1]
    imported, start = ([*map(source, all_cells[first+1:first+3]), '', ''])[:2]
    errors, name = [], path.stem.split('_', 1)[1]
    if heading['cell_type']!='markdown' or not source(heading).startswith('## Run\n'): errors.append('no heading "## Run" before the parameters')
    if source(heading).count(RUN_ONLY)!=1: errors.append('does not say how to run this stage only')
    if 'from elbowsynth.stages import stage_files, start_stage' not in imported: errors.append('no import of start_stage below the parameters')
    if f"\nstarted = start_stage('{name}', globals())" not in start: errors.append('no call of start_stage below the import')
    if source(last)!='#| slow\nstage_files(started)': errors.append('does not end with stage_files')
    uses = {n.id for c in all_cells[first+3:-1] if c['cell_type']=='code' for n in ast.walk(ast.parse(source(c))) if isinstance(n, ast.Name)}
    return errors+[f'{n} is used in between' for n in sorted(uses & {'started', 'stage_files', 'start_stage'})]

@pytest.mark.parametrize('path', [named(s.path) for s in STAGES])
def test_stage_ends_as_papermill_needs_it(path): assert stage_errors(path)==[]

def test_stage_rules_find_errors(tmp_path):
    path = write_notebook(tmp_path/'01_bad.ipynb', '#| export\ndef f(n=epochs): return n', ('epochs: int = 3\nrun: str = "x"  # Folder',),
                          '#| export\ndef g(): pass', 'train()')
    text = '; '.join(stage_errors(path))
    for error in ('epochs: int = 3 has no comment', 'exports below', "not flagged slow below the parameters: 'train()'", 'no parameter out',
                  'a default value uses the parameter epochs', 'no heading "## Run"', 'how to run this stage only',
                  'no call of start_stage', 'does not end with stage_files'):
        assert error in text

@pytest.mark.parametrize('path', [named(s.path) for s in STAGES if s.options_class])
def test_stage_parameters_are_fields_of_their_dataclass(path):
    "A parameter with the name of an option has the type of the field"
    import dataclasses, importlib
    stage = next(s for s in STAGES if s.path==path)
    module, _, name = stage.options_class.rpartition('.')
    fields = {f.name: f for f in dataclasses.fields(getattr(importlib.import_module(module), name))}
    shared = set(fields) & set(stage.defaults)
    assert len(shared)>=5
    for n in shared-{'label_fields'}:
        default, of_stage = fields[n].default, stage.defaults[n]
        if isinstance(default, tuple): default = list(default)
        if default is not dataclasses.MISSING and default is not None: assert type(default) is type(of_stage), (n, default, of_stage)

# How a notebook reads

@pytest.mark.parametrize('path', [named(p) for p in NOTEBOOKS])
def test_no_traces_in_outputs(path):
    nb = json.loads(path.read_text(encoding='utf-8'))
    assert not {'widgets', 'papermill'} & set(nb['metadata'])
    for c in cells(path):
        assert c['execution_count'] is None and 'papermill' not in c['metadata']
        texts = json.dumps([{k: v for k, v in o.items() if k!='data'} | {'data': text_data(o)} for o in c['outputs']])
        assert not re.search(r'/(home|tmp|root|work|Users|var)/', texts), texts[:300]
        assert not re.search(r'\b\d\d:\d\d:\d\d\b| at 0x[0-9a-f]{6}|application/vnd.jupyter.widget', texts), texts[:300]
        assert not any(o['output_type']=='error' for o in c['outputs'])
        assert len(json.dumps(c['outputs']))<150_000

def text_data(output): return {kind: text for kind, text in output.get('data', {}).items() if kind.startswith('text/')}

def module_of(path):
    "The module that a notebook should export: its folder's name, unless it is 0_core or 9_run, and its own name"
    folder, name = path.parent.name.split('_', 1)[1], path.stem.split('_', 1)[1]
    return name if folder in ('core', 'run') else f'{folder}.{name}'

def exported_module(path): return re.search(r'^#\| default_exp ([\w.]+)', source(cells(path)[0]))[1]

@pytest.mark.parametrize('path', [named(p) for p in NUMBERED])
def test_reads_as_a_page(path):
    if makes_a_module(path):
        wing, _, name = exported_module(path).rpartition('.')
        expected_wing, _, expected = module_of(path).rpartition('.')
        assert wing==expected_wing and (name==expected or expected.endswith(f'_{name}'))   # 34_gan_settings exports gans.settings
    else: assert not exported_cells(path)
    head = source(cells(path, 'markdown')[0])
    assert re.fullmatch(r'# [^\n]+\n> [^\n]+', head), head
    for c in cells(path):
        text = source(c)
        assert 'nbdev_export(' not in text and not re.search(r'^\s*[!%]', text, re.M), text
        kinds = {isinstance(o, (ast.Import, ast.ImportFrom)) for o in ast.parse(text).body}
        assert kinds!={True, False} or flagged(c, 'slow'), f'imports are in cells of their own:\n{text}'

@pytest.mark.parametrize('path', [named(p) for p in NUMBERED])
def test_links_between_notebooks_exist(path):
    for c in cells(path, 'markdown'):
        for target in re.findall(r'\]\(([^)#:\s]+\.(?:ipynb|qmd))(?:#[^)]*)?\)', source(c)):
            assert (path.parent/target).exists(), f'{target} in {path.name}'

# How exported code reads

def long_lines(text, limit=100): return [line for line in text.splitlines() if len(line)>limit and 'http' not in line]

def style_errors(text):
    "Statements with more than one idea"
    errors = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Assign):
            value, target = node.value, node.targets[0]
            if isinstance(value, ast.Lambda): errors.append(f'line {node.lineno}: lambda bound to a name')
            if isinstance(value, ast.Tuple) and any(isinstance(e, ast.Lambda) for e in value.elts): errors.append(f'line {node.lineno}: lambda bound to a name')
            several = isinstance(target, ast.Tuple) and len(target.elts)>2
            if several and isinstance(value, (ast.Tuple, ast.GeneratorExp, ast.ListComp)): errors.append(f'line {node.lineno}: {len(target.elts)} parallel assignments')
        if isinstance(node, ast.Expr) and isinstance(node.value, (ast.ListComp, ast.SetComp, ast.DictComp, ast.IfExp, ast.Tuple)):
            errors.append(f'line {node.lineno}: expression for its side effect')
    return errors

@pytest.mark.parametrize('path', [named(p) for p in NUMBERED if makes_a_module(p)])
def test_exported_code_reads_well(path):
    for text in exported_cells(path):
        assert long_lines(text)==[]
        assert style_errors(text)==[], text
        is_long = len(text.splitlines())>60 and not any(f'class {name}' in text for name in LONG_CELLS)
        assert not is_long, f'{len(text.splitlines())} lines:\n{text[:200]}'

LONG_CELLS = ['FineTuneConfig']      # one field of Table 7 per line

def statements(text):
    "Code without comments, docments and docstrings: a cell is not too long because its parameters are described"
    text = ast.unparse(ast.parse(text))
    tree = ast.parse(text)
    documented = [o for o in ast.walk(tree) if isinstance(o, (ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(o)]
    docstrings = {i for o in documented for i in range(o.body[0].lineno, o.body[0].end_lineno+1)}
    return '\n'.join(line for i, line in enumerate(text.splitlines(), 1) if i not in docstrings)

def test_exported_cells_are_short():
    lengths = [len(statements(text)) for p in NUMBERED for text in exported_cells(p)]
    assert len(lengths)>400 and np.percentile(lengths, 90)<=1200, np.percentile(lengths, 90)

def test_statements_leave_out_descriptions():
    text = '#| export\ndef f(\n    n:int, # A number\n):\n    "Twice"\n    return 2*n  # two'
    assert statements(text)=='def f(n: int):\n    return 2 * n'

def test_style_rules_find_errors():
    for bad in ('f = lambda x: x', 'a, f = 1, lambda x: x', '[print(x) for x in y]', 'a() if b else c()', 'f(), g()', 'a, b, c = 1, 2, 3', 'a, b, c = (x for x in y)'):
        assert style_errors(bad), bad
    for good in ('a, b, c = f()', 'a, b = 1, 2', 'x = [i for i in y]', 'sorted(x, key=lambda i: -i)', 'a, b, c = row'): assert not style_errors(good), good
    assert long_lines('x = 1'+' '*120) and not long_lines('# https://a.b/'+'c'*120)

# Examples

def shown_at_once(path):
    "Whether an example follows each cell that exports public functions or classes, before the next exported cell"
    code, shown = cells(path), {}
    for i, c in enumerate(code):
        if not is_exported(c): continue
        defined = [o.name for o in ast.parse(source(c)).body if isinstance(o, (ast.FunctionDef, ast.ClassDef))]
        public = [n for n in defined if not n.startswith('_') and n!='main']
        if not public: continue
        examples = []
        for later in code[i+1:]:
            if is_exported(later): break
            hidden = flagged(later, 'slow|hide|default_exp') or 'parameters' in tags(later)
            only_imports = all(isinstance(o, (ast.Import, ast.ImportFrom)) for o in ast.parse(source(later)).body)
            if not hidden and not only_imports: examples.append(later)
        shown['/'.join(public)] = bool(examples)
    return shown

@pytest.mark.parametrize('path', [named(p) for p in NUMBERED if makes_a_module(p)])
def test_exports_are_followed_by_an_example(path):
    shown = shown_at_once(path)
    without = [names for names, has_example in shown.items() if not has_example]
    assert len(without)<=.25*len(shown), f'{len(shown)-len(without)} of {len(shown)}; without: {", ".join(without)}'

def test_example_rule_finds_missing_examples(tmp_path):
    path = write_notebook(tmp_path/'01_x.ipynb', '#| export\ndef f(): pass', 'f()', '#| export\ndef g(): pass', 'import os', '#| hide\ng()', '#| export\ndef _h(): pass')
    assert shown_at_once(path)=={'f': True, 'g': False}

# The words of the field

DIALECT = ('film films hole told tells wholly kin spared crew settled judged lessons taught floors variety foil foils likeness '
           'mishap greys reckoned').split()
# (file, word): why it is right there
ALLOWED_WORDS = {
    ('tests/test_notebooks.py', '*'): 'this list',
    ('tests/test_package.py', 'film'): 'a name that does not exist',
    ('elbowsynth/diffusion/latents.py', 'film'): 'names of toy images, which seed their samples',
    ('nbs/4_diffusion/43_latents.ipynb', 'film'): 'the same names',
}
CHECKED_FILES = ['elbowsynth/**/*.py', 'elbowsynth/tiny/*.csv', 'elbowsynth/tiny/*.json', 'nbs/**/*.ipynb', 'nbs/*.qmd', 'nbs/results/**/*.csv', 'nbs/results/**/*.json',
                 'tests/*.py', 'bench/*.py', 'bench/results/*.md', 'bench/results/*.json', 'params/*.yaml', 'workflow/*.sh', 'workflow/Snakefile', 'Makefile', 'README.md', 'CONTRIBUTING.md']

def words(text): return set(re.findall(r'[a-z]+', re.sub(r'([a-z])([A-Z])', r'\1 \2', text).lower()))

def notebook_text(path):
    "Sources and text outputs of a notebook"
    parts = []
    for c in json.loads(path.read_text(encoding='utf-8'))['cells']:
        parts.append(source(c))
        for o in c.get('outputs', []): parts += [''.join(o.get('text', ''))]+[''.join(text) for text in text_data(o).values()]
    return '\n'.join(parts)

def dialect_words(path):
    text = notebook_text(path) if path.suffix=='.ipynb' else path.read_text(encoding='utf-8')
    name = path.relative_to(ROOT).as_posix()
    found = words(text) & set(DIALECT)
    return sorted(w for w in found if (name, w) not in ALLOWED_WORDS and (name, '*') not in ALLOWED_WORDS)

@pytest.mark.parametrize('pattern', CHECKED_FILES)
def test_no_word_of_the_old_dialect(pattern):
    paths = [p for p in ROOT.glob(pattern) if p.is_file() and not {'__pycache__', '.ipynb_checkpoints'} & set(p.parts)]
    assert paths, f'no file matches {pattern}'
    found = {p.relative_to(ROOT).as_posix(): dialect_words(p) for p in paths}
    assert {name: found[name] for name in found if found[name]}=={}

def test_dialect_is_found_in_identifiers_and_strings():
    assert words('def read_film(x): return {"isTold": x.films_left, "wholly masked": 1}')>={'film', 'told', 'films', 'wholly'}
    assert not words('profile microfilming holes') & set(DIALECT)

# The library

def test_each_module_has_its_notebook():
    for p in MODULES:
        edited = re.search(r'File to edit: (\S+\.ipynb)', p.read_text(encoding='utf-8'))[1]
        assert (LIBRARY/'..'/'nbs'/edited.split('nbs/', 1)[1]).exists(), (p, edited)
    modules = {'.'.join(p.relative_to(LIBRARY).with_suffix('').parts) for p in MODULES}
    assert modules=={exported_module(p) for p in NUMBERED if makes_a_module(p)}

# The picture of the library: the parts that each part may import, besides its own modules.
# core, paper <- study, stages <- data <- {phantom, evaluation, training} <- {gans, diffusion} <- report <- experiments; run knows the stages only, and site may use all
BASE = {'core', 'paper', 'stages', 'study'}
IMPORTS = {
    'core': set(), 'paper': set(), 'study': {'core'}, 'stages': {'core', 'paper'}, 'data': BASE,
    'phantom': BASE | {'data'}, 'training': BASE | {'data'}, 'evaluation': BASE | {'data', 'training'},      # training: get_device
    'gans': BASE | {'data', 'phantom', 'evaluation', 'training'},
    'diffusion': BASE | {'data', 'phantom', 'evaluation', 'training'},
    'report': BASE | {'data', 'phantom', 'evaluation', 'training', 'gans', 'diffusion'},
    'experiments': BASE | {'data', 'phantom', 'evaluation', 'training', 'gans', 'diffusion', 'report'},
    'staleness': BASE, 'provenance': set(), 'job': BASE | {'provenance'},
    'cluster': BASE | {'data', 'diffusion', 'job'},
    'status': BASE | {'job', 'provenance', 'staleness'}, 'costs': BASE | {'data', 'diffusion', 'gans', 'job', 'cluster'},
    'run': BASE | {'report', 'job', 'provenance', 'cluster', 'staleness', 'status', 'costs'},       # report: secure_page; its command line calls status and costs
    'site': BASE | {'data', 'phantom', 'evaluation', 'training', 'gans', 'diffusion', 'report', 'experiments', 'run'}}

def part_of(module): return module.split('.')[0]
def import_edges():
    "Module to the modules that it imports"
    edges = {}
    for p in MODULES:
        name = '.'.join(p.relative_to(LIBRARY).with_suffix('').parts)
        edges[name] = imported_modules(p.read_text(encoding='utf-8'), name.rpartition('.')[0])
    return edges

def test_imports_go_one_way():
    edges = import_edges()
    for module, imported in edges.items():
        wrong = {m for m in imported if part_of(m)!=part_of(module) and part_of(m) not in IMPORTS[part_of(module)]}
        assert not wrong, f'{module} imports {sorted(wrong)}'
    # the test sees imports: of each wing, between wings, and many
    for module, imported in {'data.masks': 'data.images', 'gans.gan': 'training', 'diffusion.flux': 'diffusion.finetune', 'run': 'stages',
                             'experiments.ablation': 'paper', 'report.tables': 'core', 'evaluation.metrics': 'evaluation.ssim'}.items():
        assert imported in edges[module], f'{module}: {sorted(edges[module])}'
    assert sum(len(imported) for imported in edges.values())>150

def test_imports_have_no_circle():
    edges, done = import_edges(), set()
    def visit(module, path):
        assert module not in path, ' -> '.join([*path, module])
        if module in done: return
        for imported in edges[module]: visit(imported, [*path, module])
        done.add(module)
    for module in edges: visit(module, [])

def test_ruff():
    "Undefined and unused names, lambdas bound to a name, useless expressions, and functions with too many branches"
    sh('ruff', 'check', '--no-cache', '--isolated', '--select', 'F821,F401,E731,B018,C901', '--config', 'lint.mccabe.max-complexity = 14',
       '--per-file-ignores', '_modidx.py:F401', 'elbowsynth')

def tree_state(top):
    "Relative path to contents of all files that nbdev may write"
    files = [p for n in ('nbs', 'elbowsynth') for p in (top/n).rglob('*') if p.is_file() and '__pycache__' not in p.parts]
    return {p.relative_to(top).as_posix(): p.read_bytes() for p in [*files, top/'README.md']}

def test_clean_and_export_leave_no_difference(tmp_path):
    ignored = shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints')
    for n in ('nbs', 'elbowsynth', 'settings.ini', 'setup.py', 'README.md', '_quarto.yml'):
        if (ROOT/n).is_dir(): shutil.copytree(ROOT/n, tmp_path/n, ignore=ignored)
        else: shutil.copy(ROOT/n, tmp_path/n)
    before = tree_state(tmp_path)
    assert 'elbowsynth/data/__init__.py' in before and 'nbs/2_data/31_masks.ipynb' in before
    for command in (['nbdev_clean'], ['nbdev_export'], ['python', '-m', 'elbowsynth.site', '--readme']):
        sh(*command, cwd=tmp_path, PYTHONPATH=str(tmp_path))
    after = tree_state(tmp_path)
    assert sorted(n for n in {**before, **after} if before.get(n)!=after.get(n))==[]

@pytest.mark.parametrize('path', [named(p) for p in NUMBERED if makes_a_module(p)])
def test_cells_pass(path, monkeypatch):
    "In this process, which has imported the heavy packages for the notebooks before"
    import matplotlib.pyplot as plt
    from nbdev.test import test_nb
    monkeypatch.setenv('IN_TEST', '1')
    monkeypatch.setenv('ELBOWSYNTH_PROFILE', 'none')
    monkeypatch.delenv('JPY_SESSION_NAME', raising=False)
    passed, _ = test_nb(path, skip_flags=['slow'], force_flags=[])
    plt.close('all')
    assert passed

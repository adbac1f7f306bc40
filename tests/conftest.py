"""Helpers for all tests, the order in which they run, and a list of the tests that were left out

`make test` runs two workers side by side. Tests that share an expensive fixture run in one worker, so that the fixture is made once.
"""
import os, re, shutil, subprocess, sys
os.environ.setdefault('OMP_NUM_THREADS', '1')                       # a worker for each core
from pathlib import Path
import pytest
from hypothesis import settings

ROOT = Path(__file__).resolve().parents[1]
ALL = os.environ.get('ELBOWSYNTH_ALL', '') not in ('', '0')
N_KILLS = int(os.environ.get('ELBOWSYNTH_KILLS', 20))              # of each training, at random file operations, with ALL=1
left_out = []

# Property tests draw the same examples each time, and new ones in `make fuzz`
settings.register_profile('same', derandomize=True)
settings.register_profile('new', print_blob=True)
settings.load_profile(os.environ.get('ELBOWSYNTH_HYPOTHESIS') or 'same')

# Files whose tests take longest run first, so that both workers end at about the same time
FIRST = ['test_study', 'test_runner', 'test_site', 'test_distributed', 'test_search', 'test_notebooks', 'test_gans', 'test_diffusion', 'test_preprocess']

def pytest_configure(config):
    config.addinivalue_line('markers', 'long(why): takes minutes; left out unless ALL=1')

def shared_fixtures(item):
    "Names of the fixtures of a test file that several of its tests share, with their parameters"
    parameters = item.callspec.params if hasattr(item, 'callspec') else {}
    found = []
    for name, definitions in item._fixtureinfo.name2fixturedefs.items():
        in_test_file = definitions[-1].baseid.endswith('.py')
        if in_test_file and definitions[-1].scope in ('module', 'session'):
            found.append(f'{name}-{parameters[name]}' if name in parameters else name)
    return {f'{item.path.stem}.{name}' for name in found}

def fixture_groups(items):
    "Each shared fixture to the name of its group: fixtures that one test uses together are one group"
    group = {}
    for item in items:
        shared = shared_fixtures(item)
        joined = shared | {group[name] for name in shared if name in group}
        if not joined: continue
        first = min(joined)
        group |= {name: first for name in joined}
        group = {name: first if value in joined else value for name, value in group.items()}
    return group

@pytest.hookimpl(tryfirst=True)                                     # before xdist reads the groups
def pytest_collection_modifyitems(config, items):
    if not ALL:
        left_out.extend((i.nodeid, i.get_closest_marker('long').args[0]) for i in items if i.get_closest_marker('long'))
        items[:] = [i for i in items if not i.get_closest_marker('long')]
    order = {name: k for k, name in enumerate(FIRST)}
    items.sort(key=lambda i: order.get(i.path.stem, len(FIRST)))
    groups = fixture_groups(items)
    for item in items:
        shared = shared_fixtures(item)
        if shared: item.add_marker(pytest.mark.xdist_group(groups[min(shared)]))

def pytest_collection_finish(session):
    "xdist sends a group to one worker by the end of the test's name; pytest 9.2 with xdist 3.8 lost it"
    if not hasattr(session.config, 'workerinput'): return
    grouped = [item for item in session.items if item.get_closest_marker('xdist_group')]
    lost = [item.nodeid for item in grouped if not re.search(r'@[\w.-]+$', item.nodeid)]
    if lost: raise pytest.UsageError(f'{len(lost)} tests of a group would run in any worker: {lost[:3]}')

def pytest_sessionfinish(session):
    if hasattr(session.config, 'workeroutput'): session.config.workeroutput['left_out'] = left_out

@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error):
    for entry in getattr(node, 'workeroutput', {}).get('left_out', []):
        if tuple(entry) not in left_out: left_out.append(tuple(entry))

def pytest_terminal_summary(terminalreporter):
    skipped = []
    for report in terminalreporter.stats.get('skipped', []):
        skipped.append((report.nodeid, report.longrepr[2].removeprefix('Skipped: ')))
    if not left_out+skipped: return
    terminalreporter.section('left out')
    for name, why in left_out+skipped: terminalreporter.write_line(f'{name}: {why}')
    if left_out: terminalreporter.write_line('`make test ALL=1` includes the long tests')

def sh(*command, cwd=ROOT, check=True, timeout=1200, **env):
    "Run a command of this environment; the finished process, its output as text"
    path = f'{Path(sys.executable).parent}{os.pathsep}{os.environ["PATH"]}'
    base = {k: v for k, v in os.environ.items() if not k.startswith('ELBOWSYNTH_') and k != 'JPY_SESSION_NAME'}
    base |= {'PATH': path, 'JUPYTER_PREFER_ENV_PATH': '1', 'HF_HUB_OFFLINE': '1'} | env
    done = subprocess.run([str(c) for c in command], cwd=cwd, capture_output=True, text=True, timeout=timeout, stdin=subprocess.DEVNULL, env=base)
    if check and done.returncode:
        pytest.fail(f'{" ".join(map(str, command))} ended with {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-5000:]}')
    return done

def copy_of_checkout(to):
    "Copy what a clone would contain: the files that git knows, and new ones that it does not ignore, in their present state"
    if shutil.which('git'):
        command = ['git', 'ls-files', '-z', '--cached', '--others', '--exclude-standard']
        names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split('\0')
    else:
        ignored = {'.venv', '_runs', '_docs', '_proc', '.git', '__pycache__'}
        paths = [p.relative_to(ROOT) for p in ROOT.rglob('*') if p.is_file()]
        names = [str(p) for p in paths if not ignored & set(p.parts)]
    for name in names:
        if name and (ROOT/name).exists():
            (to/name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT/name, to/name)
    return to

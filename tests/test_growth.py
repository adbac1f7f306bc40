"bench/growth.py: exponents by hand, what a process takes, and what is measured again after an interruption"
import importlib, json, os, sys
import pytest
from conftest import ROOT
from elbowsynth.job import Job

@pytest.fixture
def growth(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT/'bench'))
    return importlib.import_module('growth')

def test_exponents_by_hand(growth):
    sizes = [100, 300, 1000]
    assert growth.exponent(sizes, [5*n for n in sizes])==pytest.approx(1)
    assert growth.exponent(sizes, [.01*n*n for n in sizes])==pytest.approx(2)
    assert growth.exponent(sizes, [7, 7, 7])==pytest.approx(0)
    assert growth.exponent([100], [5]) is None and growth.exponent([100, 300], [0, 5]) is None

def test_increase_for_one_more_radiograph(growth):
    assert growth.per_radiograph([100, 1000, 300], [4, 21, 7])==pytest.approx(.02), 'between the two largest sizes'
    assert growth.per_radiograph([100], [4]) is None

def test_a_process_and_its_children_are_measured(growth):
    "A child allocates 300 MiB and computes for half a second; its parent only waits for it"
    child = 'import time; a = bytearray(b"x")*(300*2**20); t = time.process_time()\nwhile time.process_time()-t<.5: pass'
    parent = f'import subprocess, sys; subprocess.run([sys.executable, "-c", {child!r}], check=True)'
    own = bytearray(b'x')*(700*2**20)                               # memory of this process is not the command's
    wall_s, cpu_s, peak_mib = growth.run_measured([sys.executable, '-c', parent], dict(os.environ))
    assert len(own)>2**29 and wall_s>=.5 and cpu_s>=.5 and 300<peak_mib<600
    with pytest.raises(SystemExit, match='failed with 3'): growth.run_measured([sys.executable, '-c', 'raise SystemExit(3)'], dict(os.environ))

@pytest.fixture
def fake_study(growth, tmp_path, monkeypatch):
    "Three stages in a row; the second writes twice as many bytes as there are radiographs. What was run, and their jobs"
    jobs = [Job(name, '', {'run': 'r'}, name, needed, '1') for name,needed in (('a', []), ('b', ['a']), ('c', ['b']), ('d', []))]
    ran = []
    def run(command, env):
        name, n = command[4], 60
        ran.append(name)
        folder = tmp_path/'r'/name
        folder.mkdir(parents=True)
        (folder/'stage.json').write_text('')
        (folder/'result').write_bytes(bytes(2*n if name=='b' else 5))
        return 1., 2., 3.
    monkeypatch.setattr(growth, 'root', lambda: tmp_path)
    monkeypatch.setattr(growth, 'plan', lambda *args, **values: ('r', jobs))
    monkeypatch.setattr(growth, 'environment', lambda n_threads: {})
    monkeypatch.setattr(growth, 'run_measured', run)
    return growth, ran, jobs

def test_what_was_measured_is_kept(fake_study):
    growth, ran, jobs = fake_study
    rows = growth.measure_size(60, 'rehearsal', [], [])
    assert ran==['a', 'b', 'c', 'd']
    assert rows[1]=={'stage': 'b', 'radiographs': 60, 'wall_s': 1, 'cpu_s': 2, 'peak_mib': 3, 'disk_mib': 120/2**20, 'files': 2}
    again = growth.measure_size(60, 'rehearsal', [], [])
    assert ran==['a', 'b', 'c', 'd'] and json.dumps(again)==json.dumps(growth.round_floats(again))
    assert [r['files'] for r in again]==[2, 2, 2, 2]

def test_other_code_is_measured_again_with_all_that_reads_it(fake_study):
    growth, ran, jobs = fake_study
    growth.measure_size(60, 'rehearsal', [], [])
    jobs[1].code_hash = '2'
    growth.measure_size(60, 'rehearsal', [], [])
    assert ran[4:]==['b', 'c'], 'not a and d, which do not read b'

def test_table(growth):
    rows = [{'stage': 's', 'radiographs': n, 'wall_s': 10., 'cpu_s': n/10, 'peak_mib': 100+n, 'disk_mib': 0., 'files': 0} for n in (100, 200)]
    row, = growth.growth_table(rows)
    assert row['exponent of cpu']==pytest.approx(1) and row['exponent of wall']==pytest.approx(0) and row['exponent of disk'] is None
    assert row['CPU ms a radiograph']==pytest.approx(100) and row['memory kB a radiograph']==pytest.approx(2**20/1000)

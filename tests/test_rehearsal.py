"bench/rehearsal.py: sums of a made run by hand"
import importlib, json
import pytest
from conftest import ROOT

@pytest.fixture
def rehearsal(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT/'bench'))
    return importlib.import_module('rehearsal')

def write_run(folder, state='done'):
    "Two jobs of one stage side by side, then one of another"
    (folder/'logs').mkdir(parents=True)
    jobs = [('sdxl.a', 'sdxl', 1000, 1060, 'done'), ('sdxl.b', 'sdxl', 1030, 1120, 'done'), ('metrics', 'metrics', 1150, 1180, state)]
    for job, stage, started, ended, s in jobs:
        record = {'job': job, 'stage': stage, 'started': started, 'ended': ended, 'seconds': ended-started, 'state': s}
        (folder/'logs'/f'{job}.json').write_text(json.dumps(record))
    (folder/'sdxl').mkdir()
    for i in range(3): (folder/'sdxl'/f'{i}.png').write_bytes(bytes(2**20))
    return folder

def test_sums_by_hand(rehearsal, tmp_path):
    folder = write_run(tmp_path/'run')
    records = rehearsal.read_records(folder)
    sdxl, metrics = rehearsal.stage_rows(records, {}, folder)
    assert sdxl=={'stage': 'sdxl', 'jobs': 2, 'computing (min)': 2.5, 'longest job (min)': 1.5, 'begins at (min)': 0, 'ends at (min)': 2, 'disk (MiB)': 3, 'files': 3}
    assert (metrics['begins at (min)'], metrics['ends at (min)'], metrics['files'])==(2.5, 3, 0)
    total = rehearsal.total_row(records, [sdxl, metrics], folder)
    assert (total['jobs'], total['computing (min)'], total['ends at (min)'], total['files'])==(3, 3, 3, 6)

@pytest.mark.parametrize('state, message', [('running', 'not done: metrics'), (None, 'no records of jobs')])
def test_an_unfinished_run_has_no_table(rehearsal, tmp_path, state, message):
    folder = write_run(tmp_path/'run', state) if state else tmp_path
    with pytest.raises(SystemExit, match=message): rehearsal.read_records(folder)

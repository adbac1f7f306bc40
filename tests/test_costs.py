"The table of `make study DRY=1`: totals by hand, parts against whole stages, a data folder, the command"
import sys
import pytest
from conftest import ROOT
from elbowsynth import costs, run
from elbowsynth.run import plan

@pytest.fixture(scope='module')
def whole():
    _, jobs = plan('paper')
    counts = costs.planned_counts(jobs)
    return counts, costs.cost_table(jobs, counts)

@pytest.fixture(scope='module')
def parts(whole):
    _, jobs = plan('paper', cluster='slurm')                        # the code was read by the fixture before
    return costs.cost_table(jobs, whole[0])

def test_hours_at_the_papers_size(whole):
    "By hand: 200 of 220 epochs are the paper's; a sample of FLUX is 50 forward passes, an image of a training step is 4"
    table = whole[1].set_index('job')
    training = {'sdxl': 200, 'flux': 360}
    for model, passes in (('sdxl', 100), ('flux', 50)):
        per_pass = training[model]/(200*2119*4)
        assert table.hours[model]==pytest.approx(training[model]*1.1+12*898*passes*per_pass, rel=1e-6)
    assert table.hours['ac_gan']==pytest.approx(48*.9) and table.hours['tac_gan']==pytest.approx(52*.9)
    assert table.hours['wgan_gp']==pytest.approx(28*32*.9)

def test_parts_add_up_to_whole_stages(whole, parts):
    "Opening a stage into jobs must not change what it needs in all"
    stages = whole[1].set_index('stage')
    logs = 3                                                        # files of each job, besides the results
    of_jobs, of_stages = parts.assign(files=parts.files-logs), stages.assign(files=stages.files-logs)
    for column, tolerance in (('hours', 1e-6), ('disk_gb', .01), ('files', .02)):
        sums, stages = of_jobs.groupby('stage')[column].sum(), of_stages
        for model in costs.PAPER_HOURS:
            assert sums[model]==pytest.approx(stages[column][model], rel=tolerance), (model, column)
    assert len(parts)>300 and parts.job.is_unique

def test_a_larger_study_needs_more():
    _, jobs = plan('demo')
    small, large = (costs.cost_table(jobs, costs.table3_counts(share)).set_index('job') for share in (.1, .2))
    for column in ('hours', 'files'): assert (large[column]>=small[column]).all() and large[column].sum()>1.5*small[column].sum()
    assert (small.on=='2 cores').all() and (small.gpu_gib==0).all()

def test_the_demo_run_is_estimated_as_it_was(whole):
    "With the counts of the demo run, the estimate is the time that it took"
    _, jobs = plan('demo')
    counts = costs.Counts(120, {'normal': (94, 36), **{p: (0, 0) for p in costs.TABLE3 if p!='normal'}}, '')
    table = costs.cost_table(jobs, counts).set_index('job')
    for job, seconds in (('ac_gan', 124.6), ('sdxl', 166.8), ('flux', 382.0), ('phantom', 28.1)):
        assert 3600*table.hours[job]==pytest.approx(seconds, rel=.02), job

def test_counts_of_a_data_folder(tmp_path):
    rows = [f'{i}.png,P{i},LAT,right,supracondylar fracture' for i in range(20)]+['3.png,P3,LAT,right,joint effusion']
    (tmp_path/'labels.csv').write_text('\n'.join(['file,patient,view,side,pathology', *rows]))
    counts = costs.data_counts(tmp_path)
    assert (counts.images, costs.count_pairs(counts))==(20, (15, 6)), 'no image exists, and none is needed'
    with pytest.raises(FileNotFoundError, match='labels.csv is missing'): costs.data_counts(tmp_path/'none')

def test_dry_run_lists_every_job(monkeypatch, capsys):
    "The command of `make study DRY=1`: all jobs, the paper's hours, and no run folder"
    folders = set((ROOT/'_runs').glob('*'))
    arguments = ['elbowsynth', 'study', '--profile', 'paper', '--run', 'only_listed', '--dry', '--cluster', 'slurm']
    monkeypatch.setattr(sys, 'argv', arguments)
    with pytest.raises(SystemExit) as ended: run.main()
    text = capsys.readouterr().out
    assert ended.value.code==0
    assert '2,783 radiographs, 2,119 training and 898 test pairs (Table 3)' in text
    for printed in ('996', '200', '360'): assert f'the paper: {printed}\n' in text
    for job in run.plan('paper', cluster='slurm')[1]: assert f'\n{job.name} ' in text
    assert ROOT/'_runs'/'only_listed' not in set((ROOT/'_runs').glob('*'))-folders

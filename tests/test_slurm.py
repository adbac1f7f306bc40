"""A study as jobs of a real Slurm: slurmctld, slurmd and munge of Debian's packages on this machine, with a fake GPU

Toy stages go through the faults: a node of theirs is drained, the controller restarts, jobs and the study itself are killed. The small study shows that
result files equal those of a run on this machine.
"""
import json, os, re, shutil, signal, subprocess, sys, threading, time
from pathlib import Path
import pytest, yaml
from conftest import ROOT, copy_of_checkout, sh
from kills import cached_tensors, same_caches
from test_runner import OPEN_FOLDER, notebook
from elbowsynth.cluster import job_prefix, queued_jobs

pytestmark = pytest.mark.long('starts a Slurm and sends studies through it, minutes')

# Slurm

def out(*command): return subprocess.run([str(c) for c in command], capture_output=True, text=True, check=True).stdout.strip()

def install_slurm():
    "Install Debian's packages; why that is not possible, or nothing"
    if shutil.which('slurmctld') and shutil.which('munged'): return ''
    if os.getuid() or not shutil.which('apt-get'): return 'Slurm is not installed (slurm-wlm and munge of Debian), and only root could install it'
    command = 'apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends slurm-wlm munge'
    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=300)
    return '' if done.returncode==0 else f'Slurm cannot be installed: {done.stderr.strip()[-200:]}'

def start_requeued_jobs_at_once(ended):
    "A job that goes back into the queue waits two minutes by default"
    while not ended.wait(1):
        rows = subprocess.run(['squeue', '--noheader', '--format=%i %r'], capture_output=True, text=True).stdout.splitlines()
        for row in rows:
            number, reason = row.split(maxsplit=1)
            if reason=='BeginTime': subprocess.run(['scontrol', 'update', f'JobId={number}', 'StartTime=now'], capture_output=True)

@pytest.fixture(scope='module')
def slurm(tmp_path_factory):
    "Folder of a Slurm that runs on this machine"
    if os.getuid(): pytest.skip('a Slurm of its own is started by root only')
    if Path('/etc/slurm/slurm.conf').exists(): pytest.skip('this machine belongs to a Slurm cluster: /etc/slurm/slurm.conf')
    why = install_slurm()
    if why: pytest.skip(why)
    folder = tmp_path_factory.mktemp('slurm')
    for parent in folder.parents[:3]: parent.chmod(0o755)                               # munge refuses others
    sh('bash', ROOT/'tests'/'slurm.sh', 'start', folder)
    ended = threading.Event()
    operator = threading.Thread(target=start_requeued_jobs_at_once, args=(ended,), daemon=True)
    operator.start()
    yield folder
    ended.set()
    operator.join()
    for process in STARTED:
        if process.poll() is None: os.killpg(process.pid, signal.SIGKILL)
    subprocess.run(['scancel', '--me'], capture_output=True)
    sh('bash', ROOT/'tests'/'slurm.sh', 'stop', folder)

# Toy stages: data -> ac_gan, trained in parts -> metrics, scored in parts

DATA_PARAMETERS = """run: str = "_runs/x"  # Folder of the run
out: str = "split"  # Output folder
n: int = 3  # Images"""
DATA_BODY = OPEN_FOLDER+"(o/'images.json').write_text(json.dumps(list(range(n))))"

GAN_PARAMETERS = """run: str = "_runs/x"  # Folder of the run
split: str = "split"  # Input folder
out: str = "ac_gan"  # Output folder
epochs: int = 6  # Epochs
checkpoint_every: int = 2  # Epochs between two checkpoints
steps_per_epoch: int = 10  # Steps
sleep: float = 0.1  # Seconds a step
stop_epoch: int = -1  # Stop at this checkpoint
device: str = "cpu"  # auto: on a GPU"""
GAN_BODY = OPEN_FOLDER+"""import hashlib, os, signal
from elbowsynth.core import atomic_write, save_json
class TrainingStopped(BaseException): pass
noted = []
before = signal.signal(signal.SIGTERM, lambda number, frame: noted.append(number))
state_path, done_path = o/'state.json', o/'steps_done'
state = json.loads(state_path.read_text()) if state_path.exists() else {'step': 0, 'weights': ''}
(o/'starts').open('a').write(f'{os.environ.get("SLURM_JOB_ID", "here")} {os.environ.get("CUDA_VISIBLE_DEVICES", "-")}\\n')
end, total = steps_per_epoch*(epochs if stop_epoch<0 else stop_epoch), steps_per_epoch*epochs
for step in progress(range(state['step'], end), 'Steps', log_every_s=.2):
    time.sleep(sleep)
    weights = hashlib.sha256(f'{state["weights"]} {step}'.encode()).hexdigest()
    state = {'step': step+1, 'weights': weights}
    with atomic_write(state_path) as part: part.write_text(json.dumps(state))
    with done_path.open('a') as f: f.write(f'{step}\\n')
    if (step+1)%(steps_per_epoch*checkpoint_every)==0:
        save_json(o/'samples'/f'{(step+1)//steps_per_epoch:04d}.json', {'weights': weights})
    if noted and step+1<end: raise TrainingStopped(f'toy: stopped at step {step+1} of {total} by SIGTERM; the same command goes on from there')
signal.signal(signal.SIGTERM, before)
if stop_epoch<0: (o/'table.csv').write_text(state['weights'])"""

METRICS_PARAMETERS = """run: str = "_runs/x"  # Folder of the run
models: list = ["ac_gan"]  # Input folders
out: str = "metrics"  # Output folder
only_checkpoints: list = []  # Score these"""
METRICS_BODY = OPEN_FOLDER+"""from elbowsynth.core import save_json
names = only_checkpoints or [f'ac_gan/{p.stem}' for p in (root()/run/'ac_gan'/'samples').glob('*.json')]
for name in names:
    model, epoch = name.split('/')
    sample, score = root()/run/model/'samples'/f'{epoch}.json', o/f'{model}_{epoch}.json'
    if sample.exists() and not score.exists(): save_json(score, {'score': len(sample.read_text())})
if not only_checkpoints: (o/'scores.csv').write_text('\\n'.join(sorted(names)))"""

RESULTS = ['split/images.json', 'ac_gan/state.json', 'ac_gan/table.csv', 'ac_gan/samples/0006.json', 'metrics/scores.csv', 'metrics/ac_gan_0004.json']

SITE = {'poll_s': 1, 'stop_s': 5, 'retries': 3, 'check_minutes': 0.0, 'max_jobs': 20,
        'kinds': {'default': {'partition': 'main', 'memory_gb': 0.5, 'hours': 0.1, 'cores': 1}, 'gan': {'gpus': 1, 'gpu': 'fake'}}}

# Snakemake's executor asks Slurm less and less often while nothing ends; a test cannot wait for that
POLL_OFTEN = '''
import snakemake_executor_plugin_slurm
snakemake_executor_plugin_slurm.Executor.next_seconds_between_status_checks = property(lambda self: 2, lambda self, value: None)
'''

def poll_often(top):
    with (top/'workflow'/'Snakefile').open('a') as f: f.write(POLL_OFTEN)

def write_site(top, name='site.yaml', **changes):
    (top/name).write_text(yaml.safe_dump(SITE | changes))
    return name

@pytest.fixture(scope='module')
def toy(tmp_path_factory):
    "A checkout with three toy stages"
    top = tmp_path_factory.mktemp('checkout')/'study'
    for n in ('workflow', 'elbowsynth'): shutil.copytree(ROOT/n, top/n, ignore=shutil.ignore_patterns('__pycache__'))
    shutil.copy(ROOT/'settings.ini', top)
    poll_often(top)
    (top/'params').mkdir()
    (top/'params'/'demo.yaml').write_text('separate_jobs: [ac_gan, metrics]')
    notebook(top/'nbs'/'01_split.ipynb', DATA_PARAMETERS, DATA_BODY)
    path = top/'nbs'/'02_ac-gan.ipynb'
    notebook(path, GAN_PARAMETERS, GAN_BODY)
    path.rename(path.with_name('02_ac_gan.ipynb'))
    (top/'nbs'/'02_ac_gan.ipynb').write_text(path.with_name('02_ac_gan.ipynb').read_text().replace("'ac-gan'", "'ac_gan'"))
    notebook(top/'nbs'/'03_metrics.ipynb', METRICS_PARAMETERS, METRICS_BODY)
    write_site(top)
    return top

def command(run, *args, site='site.yaml'):
    return [sys.executable, '-m', 'elbowsynth.run', 'study', '--run', run, *args, *(['--cluster', 'slurm', '--site', site] if site else [])]

def variables(top):
    "The environment that `sh` of conftest gives to the local run, too"
    return {k: v for k, v in os.environ.items() if not k.startswith('ELBOWSYNTH_')} | {'PYTHONPATH': str(top), 'HF_HUB_OFFLINE': '1'}

def start(top, run, *args, site='site.yaml'):
    "A study in the background, which writes to NAME.txt"
    with (top/f'{run}.txt').open('a') as f:
        process = subprocess.Popen(command(run, *args, site=site), cwd=top, env=variables(top), stderr=f, stdin=subprocess.DEVNULL, start_new_session=True)
    STARTED.append(process)
    return process

STARTED = []                                                        # also what a failed test leaves behind ends with the Slurm

def said(top, run): return (top/f'{run}.txt').read_text()

def wait_for(condition, what, seconds=600):
    end = time.time()+seconds
    while not condition():
        assert time.time()<end, f'timeout: {what}'
        time.sleep(.2)

def wait_until_done(process, top, run, seconds=1200):
    try: code = process.wait(timeout=seconds)
    except subprocess.TimeoutExpired: code = 'timeout'
    assert code==0, f'{code}\n{said(top, run)[-3000:]}\n{(top/"_runs"/run/"logs"/"workflow.log").read_text()[-3000:]}'

def record(top, run, job):
    path = top/'_runs'/run/'logs'/f'{job}.json'
    return json.loads(path.read_text()) if path.exists() else {}

def step(top, run):
    path = top/'_runs'/run/'ac_gan'/'state.json'
    return json.loads(path.read_text())['step'] if path.exists() else 0

def results(top, run): return {name: (top/'_runs'/run/name).read_bytes() for name in RESULTS}

def assert_trained_once(top, run, n_steps=60):
    "Each step was done, and none of them twice"
    steps = (top/'_runs'/run/'ac_gan'/'steps_done').read_text().split()
    assert steps==[str(i) for i in range(n_steps)]

@pytest.fixture(scope='module')
def local(toy):
    "Results of the toy study on this machine, where each stage is a job"
    sh(*command('local', '--set', 'sleep=0', site=''), cwd=toy, PYTHONPATH=str(toy))
    assert not (toy/'_runs'/'local'/'jobs').exists()
    return results(toy, 'local')

@pytest.fixture(scope='module')
def limited(slurm, toy):
    "A toy study in the background, one of whose jobs needs more than twice its time limit"
    gan = SITE['kinds']['gan'] | {'hours': 1/60}
    site = write_site(toy, 'limited.yaml', kinds=SITE['kinds'] | {'gan': gan})
    process = start(toy, 'limited', '--set', 'sleep=1.5 device=auto checkpoint_every=6', '--target', 'ac_gan', site=site)
    yield process
    if process.poll() is None: os.killpg(process.pid, signal.SIGTERM)

# Faults

def test_faults_of_a_toy_study(slurm, toy, local, limited, smoke):
    "A job killed with -9, a drained node, a restarted controller, the study itself killed with -9: nothing is lost or trained twice"
    process = start(toy, 'faults', '--set', 'sleep=0.3 device=auto')
    wait_for(lambda: step(toy, 'faults')>=3, 'the first part trains')
    first = record(toy, 'faults', 'ac_gan.train_0002')
    assert first['state']=='running' and first['slurm_job'] and first['n_starts']==1
    os.kill(first['pid'], signal.SIGKILL)                                               # the job's process
    wait_for(lambda: record(toy, 'faults', 'ac_gan.train_0002').get('n_starts')==2, 'the killed job is submitted again')
    host = out('hostname', '-s')
    out('scontrol', 'update', f'NodeName={host}', 'State=DRAIN', 'Reason=test')
    wait_for(lambda: record(toy, 'faults', 'ac_gan.train_0002').get('state')=='done', 'a job on a drained node goes on')
    wait_for(lambda: 'PENDING' in [state for state, _ in queued_jobs(toy/'_runs'/'faults').values()], 'the next part waits')
    os.kill(int((slurm/'slurmctld.pid').read_text()), signal.SIGTERM)                   # the controller
    wait_for(lambda: subprocess.run(['squeue'], capture_output=True).returncode, 'the controller ends')
    sh('bash', ROOT/'tests'/'slurm.sh', 'controller', slurm)
    wait_for(lambda: not subprocess.run(['squeue'], capture_output=True).returncode, 'the controller is back')
    assert 'drain' in out('sinfo', '--noheader', '--format=%T')                         # the controller has not forgotten it
    def resumed():
        subprocess.run(['scontrol', 'update', f'NodeName={host}', 'State=RESUME'], capture_output=True)
        return 'drain' not in out('sinfo', '--noheader', '--format=%T')
    wait_for(resumed, 'the node is resumed')
    wait_for(lambda: step(toy, 'faults')>=23, 'the second part trains')
    os.killpg(process.pid, signal.SIGKILL)                                              # the study on the login node, with its Snakemake
    process.wait()
    running = queued_jobs(toy/'_runs'/'faults')
    assert ('RUNNING', 'ac_gan.train_0004') in running.values()
    process = start(toy, 'faults', '--set', 'sleep=0.3 device=auto')
    wait_until_done(process, toy, 'faults')
    assert 'ac_gan.train_0004 still runs as Slurm job' in said(toy, 'faults')
    assert_trained_once(toy, 'faults')
    assert results(toy, 'faults')==local
    starts = (toy/'_runs'/'faults'/'ac_gan'/'starts').read_text().split('\n')[:-1]
    assert len(starts)==5 and all(line.endswith(' 0') for line in starts)               # three parts, one twice, and the last job; on the fake GPU
    assert not queued_jobs(toy/'_runs'/'faults')
    done = json.loads((toy/'_runs'/'faults'/'jobs'/'ac_gan.train_0002.json').read_text())
    assert done['values']['stop_epoch']==2 and done['stage']=='ac_gan' and done['slurm_job'] and done['host']

def test_a_finished_study_queues_nothing_and_other_values_run_again(slurm, toy, local):
    def submitted(): return out('squeue', '--states=all', '--noheader', '--format=%j|%i').count(job_prefix(toy/'_runs'/'faults'))
    before = submitted()
    done = sh(*command('faults', '--set', 'sleep=0.3 device=auto'), cwd=toy, PYTHONPATH=str(toy))
    assert 'all 3 stages are done' in done.stderr
    assert submitted()==before
    done = sh(*command('faults', '--set', 'sleep=0.3 device=auto n=4', '--target', 'split'), cwd=toy, PYTHONPATH=str(toy))
    assert 'stage 1 of 1: split done' in done.stderr and json.loads((toy/'_runs'/'faults'/'split'/'images.json').read_text())==[0, 1, 2, 3]

def test_a_job_that_outlives_its_time_limit_twice(toy, local, limited):
    "SIGTERM before the limit: the training saves a checkpoint, and Slurm starts the same job again"
    wait_until_done(limited, toy, 'limited')
    last = record(toy, 'limited', 'ac_gan.train_0006')
    numbers = [line.split()[0] for line in (toy/'_runs'/'limited'/'ac_gan'/'starts').read_text().split('\n')[:-1]]
    assert last['state']=='done' and last['n_starts']>=3
    assert numbers[0]==numbers[1]==numbers[2]                                           # the same Slurm job, which was put back into the queue
    assert said(toy, 'limited').count('ac_gan.train_0006 stopped by SIGTERM (step ')>=2
    assert_trained_once(toy, 'limited')
    for name in ('ac_gan/state.json', 'ac_gan/table.csv'): assert (toy/'_runs'/'limited'/name).read_bytes()==local[name]

@pytest.fixture
def small_disk(toy):
    "The folder of a run on a file system of 200 MB"
    folder = toy/'_runs'/'full'
    folder.mkdir(parents=True)
    subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=200m', 'tmpfs', folder], check=True)
    yield folder
    subprocess.run(['umount', '-l', folder], check=True)

def fill(folder):
    "Leave no byte"
    with (folder/'filler').open('wb') as f:
        try:
            while True: f.write(bytes(2**16))
        except OSError: pass

def test_a_full_disk(slurm, toy, local, small_disk):
    site = write_site(toy, 'once.yaml', retries=0)
    process = start(toy, 'full', '--set', 'sleep=0.2', site=site)
    wait_for(lambda: step(toy, 'full')>=5, 'the training runs')
    fill(small_disk)
    process.wait(timeout=600)
    text = said(toy, 'full')
    assert process.returncode!=0 and re.search('[Nn]o space left on device', text) and 'fix: free some space' in text and 'Traceback' not in text, text
    again = subprocess.run(command('full', '--set', 'sleep=0.2', site=site), cwd=toy, env=variables(toy), capture_output=True, text=True)
    assert again.returncode!=0 and 'fix: free some space' in again.stderr and 'Traceback' not in again.stderr, again.stderr
    (small_disk/'filler').unlink()
    wait_until_done(start(toy, 'full', '--set', 'sleep=0.2'), toy, 'full')
    assert_trained_once(toy, 'full')
    assert results(toy, 'full')==local

# The small study

@pytest.fixture(scope='module')
def smoke(slurm, tmp_path_factory):
    "A checkout with the smallest study in parts, which runs through Slurm in the background"
    top = copy_of_checkout(tmp_path_factory.mktemp('clone'))
    poll_often(top)
    profile = (top/'params'/'smoke.yaml').read_text()
    (top/'params'/'parts.yaml').write_text(profile+'\nseparate_jobs: [sdxl, metrics]\n')
    kinds = {'default': {'partition': 'main', 'memory_gb': 2.0, 'hours': 0.5, 'cores': 1}}
    site = write_site(top, kinds=kinds, check_minutes=5.0, max_jobs=2)                 # this machine has two cores
    process = start(top, 'slurm', '--profile', 'parts', site=site)
    yield top, process
    if process.poll() is None: os.killpg(process.pid, signal.SIGTERM)

def result_files(run):
    "Relative path to the result files of a run: not logs, records, executed notebooks and the report, which have times"
    left_out = {'logs', 'notebooks', 'jobs', '.snakemake', 'tensorboard', 'latents'}
    names = [p.relative_to(run) for p in run.rglob('*') if p.is_file() and p.parent!=run]
    return sorted(n for n in names if not left_out & set(n.parts) and n.name!='stage.json' and not n.name.startswith('.'))

def without_times(path):
    "Contents of a result file; of a log without its times"
    if path.suffix!='.jsonl': return path.read_bytes()
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: v for k, v in row.items() if not re.search('second|time|worker', k)} for row in rows]

def test_the_small_study_equals_a_local_run_bit_for_bit(smoke):
    top, process = smoke
    sh(*command('here', '--profile', 'parts', '--cores', 2, site=''), cwd=top, PYTHONPATH=str(top))
    wait_until_done(process, top, 'slurm')
    here, there = top/'_runs'/'here', top/'_runs'/'slurm'
    assert (there/'report.html').exists() and (there/'jobs'/'sdxl.sample_0001.json').exists() and not (here/'jobs').exists()
    assert result_files(here)==result_files(there)
    assert cached_tensors(here/'latents').keys()==cached_tensors(there/'latents').keys() and same_caches(here/'latents', there/'latents')             # which group their entries by process
    different = [str(n) for n in result_files(here) if without_times(here/n)!=without_times(there/n)]
    assert different==[]

# Preflight

def test_all_faults_are_in_one_list_and_nothing_is_queued(slurm, toy):
    kinds = {'default': {'partition': 'main', 'memory_gb': 0.5, 'hours': 0.1, 'cores': 1}, 'data': {'partition': 'mian'},
             'gan': {'gpus': 1, 'gpu': 'h100'}, 'score': {'memory_gb': 900, 'cores': 64}}
    site = write_site(toy, 'wrong.yaml', kinds=kinds)
    done = sh(*command('wrong', '--set', 'device=auto', site=site), cwd=toy, check=False, PYTHONPATH=str(toy))
    for fault in ("kinds.data.partition: no partition 'mian'; did you mean 'main'?", "kinds.gan.gpu: no node of the partition main has a GPU 'h100'; there are: 1 fake",
                  'kinds.score.memory_gb: 900; the largest node of the partition main has 16', 'kinds.score.cores: 64'):
        assert fault in done.stderr, done.stderr
    assert done.returncode!=0 and 'nothing was queued' in done.stderr and 'Traceback' not in done.stderr
    assert not queued_jobs(toy/'_runs'/'wrong') and not (toy/'_runs'/'wrong'/'.snakemake').exists()
    assert not (toy/'_runs'/'wrong'/'split').exists()

def test_faults_of_a_node_are_found_on_the_node(slurm, toy):
    "What is there on the login node only: scratch, a base model, a GPU that PyTorch sees"
    blocked = toy/'blocked'
    blocked.touch()
    site = write_site(toy, 'node.yaml', check_minutes=2.0, scratch=str(blocked), activate='export PATH=/usr/bin:/bin')
    done = sh(*command('node', '--set', 'device=auto', site=site), cwd=toy, check=False, PYTHONPATH=str(toy))
    assert done.returncode!=0 and done.stderr.count(f'node of main: the folder of scratch cannot be written: {blocked}')==2, done.stderr
    assert 'node of main: PyTorch sees no GPU in a job with a GPU' in done.stderr and 'Traceback' not in done.stderr
    assert not (toy/'_runs'/'node'/'split').exists() and not queued_jobs(toy/'_runs'/'node')

@pytest.mark.parametrize('arguments, message', [
    (['--cluster', 'slurmm'], 'CLUSTER=slurmm: expected slurm'),
    (['--cluster', 'slurm', '--site', 'absent.yaml'], 'absent.yaml: no such file; expected the description of your cluster'),
    (['--cluster', 'slurm', '--site', 'unknown_key.yaml'], "max_job: unknown key; did you mean 'max_jobs'?")])
def test_faults_of_the_site_file(toy, arguments, message):
    (toy/'unknown_key.yaml').write_text('max_job: 3')
    done = sh(*command('site', *arguments, site=''), cwd=toy, check=False, PYTHONPATH=str(toy))
    assert done.returncode!=0 and message in done.stderr and 'Traceback' not in done.stderr and not (toy/'_runs'/'site').exists()

# One stage

def test_srun_papermill_runs_one_stage_from_any_directory(slurm, toy, local, tmp_path):
    (tmp_path/'values.yaml').write_text(yaml.safe_dump({'run': '_runs/by_hand', 'n': 3}))
    papermill = Path(sys.executable).with_name('papermill')
    executed = tmp_path/'executed.ipynb'
    done = sh('srun', '--chdir', tmp_path, papermill, toy/'nbs'/'01_split.ipynb', executed, '-f', tmp_path/'values.yaml', '-k', 'python3', '--log-output',
              cwd=tmp_path, PYTHONPATH=str(toy))
    assert executed.exists() and (toy/'_runs'/'by_hand'/'split'/'images.json').read_bytes()==local['split/images.json'], done.stderr
    assert not (tmp_path/'_runs').exists()

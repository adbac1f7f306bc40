"Trainings in parts: chains of jobs, SIGTERM, and locks that hold between nodes. Started as a script, this file trains until it gets SIGTERM"
import errno, json, os, shutil, signal, subprocess, sys, threading, time
from pathlib import Path
import pytest
from conftest import N_KILLS, ROOT
from kills import differing_files, run_with_kills
from elbowsynth import training
from elbowsynth.gans import ac_gan, wgan_gp
from elbowsynth.training import lock_training, stop_requested, TrainingStopped
import test_gans
from test_gans import one_thread, TRAIN                             # noqa: F401
if __name__!='__main__':
    import test_diffusion
    from elbowsynth.diffusion import finetune
    from elbowsynth.diffusion.sdxl import train_sdxl
    from test_diffusion import PAIRS, QUICK_SDXL, TOY, toy_tune

# ---- locks

OTHER = {'host': 'node7', 'pid': 12, 'slurm_job': '345'}

def locked_by(owner, folder, age=0):
    "The lock file of a training folder, as another process has left or keeps it"
    path = folder.with_name(f'.{folder.name}.lock')
    path.write_text(json.dumps(owner))
    os.utime(path, (time.time()-age,)*2)
    return path

def age_instead_of_sleeping(path, monkeypatch, then=lambda: None):
    "In place of a pause the file becomes older"
    slept = []
    def sleep(seconds):
        slept.append(seconds)
        modified = path.stat().st_mtime-seconds
        then()
        if path.exists(): os.utime(path, (modified, modified))
    monkeypatch.setattr(training.time, 'sleep', sleep)
    return slept

def test_a_lock_that_another_node_refreshes_is_held(tmp_path, monkeypatch):
    path = locked_by(OTHER, tmp_path/'out', age=70)
    monkeypatch.setattr(training.time, 'sleep', lambda seconds: os.utime(path))
    with pytest.raises(RuntimeError, match=r'another process \(pid 12 on node7, Slurm job 345\) is training in .*out; .*fix: '):
        with lock_training(tmp_path/'out'): pass
    assert json.loads(path.read_text())==OTHER and [p.name for p in tmp_path.iterdir()]==['.out.lock']

def test_a_lock_of_a_node_that_failed_is_taken_over(tmp_path, monkeypatch, capsys):
    "After two minutes without a refresh, counted by the times of files"
    path = locked_by(OTHER, tmp_path/'out', age=70)
    slept = age_instead_of_sleeping(path, monkeypatch)
    with lock_training(tmp_path/'out'): owner = json.loads(path.read_text())
    assert (owner['host'], owner['pid'])==(training.socket.gethostname(), os.getpid())
    assert 45<=sum(slept)<=60 and 'it is taken over' in capsys.readouterr().out
    assert not path.exists()

def test_sigterm_ends_the_wait_for_a_lock(tmp_path, monkeypatch):
    path = locked_by(OTHER, tmp_path/'out')
    age_instead_of_sleeping(path, monkeypatch, then=lambda: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(TrainingStopped, match='out.lock: stopped by SIGTERM while waiting'):
        with training.stop_on_sigterm(), lock_training(tmp_path/'out'): pass
    assert json.loads(path.read_text())==OTHER

def test_of_two_nodes_that_take_over_a_lock_one_has_it(tmp_path, monkeypatch):
    path = locked_by(OTHER, tmp_path/'out', age=3600)
    third = OTHER | {'host': 'node8'}
    monkeypatch.setattr(training.time, 'sleep', lambda seconds: path.write_text(json.dumps(third)))
    with pytest.raises(RuntimeError, match='pid 12 on node8'):
        with lock_training(tmp_path/'out'): pass
    assert json.loads(path.read_text())==third

def test_the_owner_of_another_node_ends_while_it_is_waited_for(tmp_path, monkeypatch):
    path = locked_by(OTHER, tmp_path/'out')
    age_instead_of_sleeping(path, monkeypatch, then=path.unlink)
    with lock_training(tmp_path/'out'): assert json.loads(path.read_text())['pid']==os.getpid()

def test_a_file_system_without_locks(tmp_path, monkeypatch):
    "The process that a lock file names must be dead"
    def no_locks(*args): raise OSError(errno.ENOSYS, 'not supported')
    monkeypatch.setattr(training.fcntl, 'flock', no_locks)
    here = training.socket.gethostname()
    path = locked_by({'host': here, 'pid': os.getppid(), 'slurm_job': ''}, tmp_path/'out')
    with pytest.raises(RuntimeError, match=rf'\(pid {os.getppid()}\) is training in'):
        with lock_training(tmp_path/'out'): pass
    dead = subprocess.Popen(['true'])
    dead.wait()
    locked_by({'host': here, 'pid': dead.pid, 'slurm_job': ''}, tmp_path/'out')
    with lock_training(tmp_path/'out'): pass
    assert not path.exists()

def wait_for(condition):
    "At most ten seconds"
    for _ in range(1000):
        if condition(): return True
        time.sleep(.01)

def test_a_lock_is_refreshed_and_a_training_that_lost_it_ends(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(training, 'REFRESH_S', .01)
    with pytest.raises(KeyboardInterrupt):
        with lock_training(tmp_path/'out'):
            path = tmp_path/'.out.lock'
            os.utime(path, (0, 0))
            assert wait_for(lambda: path.stat().st_mtime>0)
            path.write_text(json.dumps(OTHER))
            wait_for(lambda: False)
    assert 'pid 12 on node7' in capsys.readouterr().out and json.loads(path.read_text())==OTHER

def test_a_lock_alone_leaves_sigterm_as_it_is(tmp_path):
    "Loops that do not look at the signal still end by it"
    before = signal.getsignal(signal.SIGTERM)
    with lock_training(tmp_path/'out'): assert signal.getsignal(signal.SIGTERM) is before

# ---- GANs

EPOCHS = (0, 2, 3) # Checkpoints of `train_quickly`

def train_quickly(model, out, **settings): test_gans.train_quickly(model, out, batch_size=3, **settings)

STEP = {'wgan_gp': (wgan_gp, 'wgan_step'), 'ac_gan': (ac_gan, 'conditional_gan_step'), 'tac_gan': (ac_gan, 'conditional_gan_step')}

@pytest.fixture(scope='module')
def uninterrupted(tmp_path_factory):
    "Each GAN, trained by one call"
    top = tmp_path_factory.mktemp('uninterrupted')
    for model in TRAIN: train_quickly(model, top/model)
    return top

@pytest.mark.parametrize('model', list(TRAIN))
def test_a_chain_of_parts_ends_in_the_files_of_one_call(model, uninterrupted, tmp_path):
    "Parts that are repeated do nothing"
    for stop_epoch in (*EPOCHS, 2, 3, -1): train_quickly(model, tmp_path/'out', stop_epoch=stop_epoch)
    assert differing_files(uninterrupted/model, tmp_path/'out')==[]

def test_a_chain_for_each_wgan(uninterrupted, tmp_path):
    "In another order than in one call; without merged images and tables before the closing call"
    names = sorted(p.parent.name for p in (uninterrupted/'wgan_gp').glob('*/checkpoint.safetensors'))
    assert len(names)==2
    for stop_epoch in EPOCHS:
        for name in names[::-1]: train_quickly('wgan_gp', tmp_path/'out', stop_epoch=stop_epoch, only_models=[name])
    assert sorted(p.name for p in (tmp_path/'out').iterdir())==names
    train_quickly('wgan_gp', tmp_path/'out')
    assert differing_files(uninterrupted/'wgan_gp', tmp_path/'out')==[]

def test_a_wgan_that_is_not_trained_says_why(tmp_path, capsys):
    train_quickly('wgan_gp', tmp_path/'out', only_models=['LAT__radial_head_fracture'])
    assert 'LAT__radial_head_fracture is not trained: no training images' in capsys.readouterr().out
    assert not (tmp_path/'out').exists()
    with pytest.raises(ValueError, match="only_models: no model is called AP__x; expected some of AP__"):
        train_quickly('wgan_gp', tmp_path/'out', only_models=['AP__x'])

@pytest.mark.parametrize('model', list(TRAIN))
def test_an_epoch_that_is_not_a_checkpoint_is_refused(model, tmp_path):
    with pytest.raises(ValueError, match='stop_epoch is 1, .* expected one of 0, 2, 3'):
        train_quickly(model, tmp_path/'out', stop_epoch=1)
    assert list(tmp_path.iterdir())==[]

def test_parts_of_two_models_at_once_but_not_of_one(uninterrupted, tmp_path):
    names = sorted(p.parent.name for p in (uninterrupted/'wgan_gp').glob('*/checkpoint.safetensors'))
    out = tmp_path/'out'
    with lock_training(out/names[0]):
        train_quickly('wgan_gp', out, only_models=names[1:])
        for only_models in (names[:1], []):
            with pytest.raises(RuntimeError, match=f'is training in .*{names[0]}'):
                train_quickly('wgan_gp', out, only_models=only_models)
    train_quickly('wgan_gp', out)
    assert differing_files(uninterrupted/'wgan_gp', out)==[]

def signal_at(step, model, monkeypatch):
    "SIGTERM in the middle of a training step"
    assert threading.current_thread() is threading.main_thread(), 'SIGTERM would end the tests'
    module, name = STEP[model]
    train_step, calls = getattr(module, name), []
    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls)==step: signal.raise_signal(signal.SIGTERM)
        return train_step(*args, **kwargs)
    monkeypatch.setattr(module, name, interrupted)

@pytest.mark.parametrize('step', [1, 3, 5])
@pytest.mark.parametrize('model', list(TRAIN))
def test_sigterm_saves_and_the_same_command_ends_in_the_same_files(model, step, uninterrupted, tmp_path, monkeypatch):
    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        signal_at(step, model, patch)
        with pytest.raises(TrainingStopped, match=r'stopped at step \d of \d by SIGTERM; the same command goes on'):
            train_quickly(model, tmp_path/'out')
    assert signal.getsignal(signal.SIGTERM) is before and not stop_requested()
    assert list(tmp_path.glob('.*'))==[]                            # no lock is left
    train_quickly(model, tmp_path/'out')
    assert differing_files(uninterrupted/model, tmp_path/'out')==[]

def test_sigterm_stops_all_models_that_are_trained_in_turns(uninterrupted, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        signal_at(2, 'wgan_gp', patch)
        with pytest.raises(TrainingStopped): train_quickly('wgan_gp', tmp_path/'out', n_parallel=2)
    steps = [json.loads(p.read_text().splitlines()[-1])['step'] for p in (tmp_path/'out').glob('*/log.jsonl')]
    assert len(list((tmp_path/'out').glob('*/checkpoint.safetensors')))==2 and len(steps)==2
    train_quickly('wgan_gp', tmp_path/'out')
    ignored = 'rng/cpu'                                             # what they share
    assert differing_files(uninterrupted/'wgan_gp', tmp_path/'out', [ignored])==[]

def train_until_sigterm(model, out):
    "What the script does: in the second step it waits for the signal"
    module, name = STEP[model]
    train_step, calls = getattr(module, name), []
    def waiting(*args, **kwargs):
        calls.append(1)
        if len(calls)==2: print('second step', flush=True)
        while len(calls)==2 and not stop_requested(): time.sleep(.01)
        return train_step(*args, **kwargs)
    setattr(module, name, waiting)
    train_quickly(model, Path(out))

def signal_script(*args):
    "Start this file as a script, send SIGTERM when it says so, and return its last words"
    env = os.environ | {'OMP_NUM_THREADS': '1', 'PYTHONPATH': os.pathsep.join([str(ROOT), str(ROOT/'tests')])}
    process = subprocess.Popen([sys.executable, __file__, *map(str, args)], stdout=subprocess.PIPE, text=True, env=env)
    for line in process.stdout:
        if line=='second step\n': break
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    assert process.returncode==75, said
    return said

def test_sigterm_from_outside(uninterrupted, tmp_path):
    said = signal_script('train_until_sigterm', 'ac_gan', tmp_path/'out')
    assert 'out: stopped at step 2 of 8 by SIGTERM' in said
    train_quickly('ac_gan', tmp_path/'out')
    assert differing_files(uninterrupted/'ac_gan', tmp_path/'out')==[]

# ---- inpainting models

CHECKPOINTS = (0, 1, 2, 3) # Of `toy_tune`, the last one boosted

@pytest.fixture(scope='module')
def tuned(tmp_path_factory):
    "The toy of two numbers, trained and sampled by one call"
    return toy_tune(tmp_path_factory.mktemp('tuned')/'run'/'out')

def same_files(a, b): return differing_files(a.parent, b.parent)==[]

@pytest.mark.parametrize('order', [
    'train0 sample0 train1 sample1 train2 sample2 train3 sample3',      # one after the other
    'train1 train2 train3 sample3 sample1 sample0 sample2',             # training is far ahead
    'train3 sample2 sample3 train3 sample2 sample0 sample1',            # one job, and repetitions
    'train1 sample0 train1 train2 sample2 train3',                      # the last call does the rest
    'train2'])
def test_a_chain_with_jobs_that_sample_ends_in_the_files_of_one_call(order, tuned, tmp_path):
    out, sampled = tmp_path/'run'/'out', set()
    for job in order.split():
        kind, epoch = job[:-1], int(job[-1])
        toy_tune(out, **{'train': dict(stop_epoch=epoch), 'sample': dict(sample_epoch=epoch)}[kind])
        if kind=='sample': sampled.add(f'{epoch:04d}')
        assert {p.name for p in out.glob('samples/*')}==sampled
    toy_tune(out)
    assert same_files(tuned, out) and not (out/'checkpoints').exists()

def test_sampling_while_the_training_goes_on(tuned, tmp_path):
    "A job that samples has its own lock, and a job that trains leaves its temporary files alone"
    out = tmp_path/'run'/'out'
    toy_tune(out, stop_epoch=1)
    with lock_training(out, ('samples', 'raw', 'checkpoints')):
        toy_tune(out, sample_epoch=1)
        with pytest.raises(RuntimeError, match='is training in .*out; '): toy_tune(out, stop_epoch=2)
    unfinished = out/'raw'/'.0000'/'.part-a.png'
    unfinished.parent.mkdir()
    unfinished.touch()
    with lock_training(out.with_name('out.0000')):
        toy_tune(out, stop_epoch=2)
        assert unfinished.exists()
        for options in (dict(sample_epoch=0), {}):                  # the closing job waits for all
            with pytest.raises(RuntimeError, match='is training in .*out.0000; '): toy_tune(out, **options)
    toy_tune(out)
    assert same_files(tuned, out)

def test_folders_may_vanish_while_files_are_listed(tmp_path):
    "A job that samples renames its folders while one that trains looks for leftovers"
    for name in ('a.txt', 'raw/.0001/b.png', 'samples/c.png'):
        (tmp_path/name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path/name).touch()
    files = training.files_below(tmp_path, skipped=('samples',))
    assert next(files)==tmp_path/'a.txt'
    (tmp_path/'raw').rename(tmp_path/'raw-2')
    assert list(files)==[] and {p.name for p in training.files_below(tmp_path)}=={'a.txt', 'b.png', 'c.png'}

def files_of(folder): return {p: p.read_bytes() for p in folder.rglob('*') if p.is_file()}

def test_sampling_needs_the_weights_and_settings_of_the_training(tmp_path, capsys):
    out = tmp_path/'run'/'out'
    with pytest.raises(FileNotFoundError, match='config.json is missing; the stage `sdxl`'): toy_tune(out, sample_epoch=0)
    assert not out.exists()
    toy_tune(out, stop_epoch=1)
    before = files_of(tmp_path)
    for options, message in ((dict(sample_epoch=2), 'up to step 3; expected step 6, epoch 2; fix: run its job with stop_epoch=2'),
                             (dict(sample_epoch=5), 'expected one of 0, 1, 2, 3'), (dict(stop_epoch=5), 'expected one of 0, 1, 2, 3'),
                             (dict(sample_epoch=1, lr=.2), 'other settings: lr was 0.1, is 0.2'),
                             (dict(sample_epoch=1, num_inference_steps=3), 'num_inference_steps was 50, is 3')):
        with pytest.raises(ValueError, match=message): toy_tune(out, **options)
    assert files_of(tmp_path)==before and capsys.readouterr().out.count('starts at')==1
    toy_tune(out, sample_epoch=1)
    shutil.rmtree(out/'samples'/'0001')
    toy_tune(out, sample_epoch=1)                                   # from the file to resume from? no: said
    assert 'the weights of epoch 1 are no longer kept' in capsys.readouterr().out

def test_kept_weights_are_sampled_with_the_settings_of_the_last_call(tmp_path):
    "Another number of sampling steps for all that is not sampled yet; another learning rate keeps them aside"
    out = tmp_path/'run'/'out'
    toy_tune(out, stop_epoch=2)
    toy_tune(out, sample_epoch=1)
    toy_tune(out, num_inference_steps=9)
    assert sorted(p.name for p in (out/'samples').iterdir())==['0000', '0002', '0003']
    assert [p.name for p in (out/'evaluation-previous-1'/'samples').iterdir()]==['0001']
    toy_tune(out, stop_epoch=1, lr=.2)
    toy_tune(out, lr=.3)
    kept = tmp_path/'run'/'out-previous-2'/'checkpoints'
    assert sorted(p.name for p in kept.iterdir())==['0000.safetensors', '0001.safetensors'] and not (kept.parent/'samples').exists()

def test_without_hard_links_weights_are_copied(tuned, tmp_path, monkeypatch):
    def no_links(*args): raise OSError(errno.EPERM, 'not supported')
    monkeypatch.setattr(os, 'link', no_links)
    for stop_epoch in (2, 3, -1): toy_tune(tmp_path/'run'/'out', stop_epoch=stop_epoch)
    assert same_files(tuned, tmp_path/'run'/'out')

@pytest.mark.parametrize('parts', [[{}], [dict(stop_epoch=1), dict(stop_epoch=3), dict(sample_epoch=1), {}]], ids=['whole', 'parts'])
@pytest.mark.parametrize('step', [1, 3, 5, 9])
def test_sigterm_saves_a_fine_tuning(step, parts, tuned, tmp_path, monkeypatch):
    "In the middle of a step, at a checkpoint, in a boosted epoch"
    out, steps = tmp_path/'run'/'out', []
    next_batch = finetune.next_batch
    def interrupted(run, *args):
        steps.append(run.step)
        if len(steps)==step: signal.raise_signal(signal.SIGTERM)
        return next_batch(run, *args)
    monkeypatch.setattr(finetune, 'next_batch', interrupted)
    n_stopped = 0
    for options in parts:
        try: toy_tune(out, **options)
        except TrainingStopped as e:
            n_stopped += 1
            assert str(e)==f'out: stopped at step {step} of 9 by SIGTERM; the same command goes on from there'
            toy_tune(out, **options)
    assert n_stopped==1 and steps==list(range(9))                   # no step was done twice
    assert same_files(tuned, out)

@pytest.mark.parametrize('options', [{}, dict(sample_epoch=1)], ids=['whole', 'sample'])
def test_sigterm_while_images_are_generated_stops_at_once(options, tuned, tmp_path, monkeypatch):
    out = tmp_path/'run'/'out'
    if options: toy_tune(out, stop_epoch=1)
    with monkeypatch.context() as patch:
        def interrupted(*args, **kwargs):
            signal.raise_signal(signal.SIGTERM)
            raise AssertionError('it went on')
        patch.setattr(test_diffusion, 'toy_sample', interrupted)
        with pytest.raises(TrainingStopped, match='out: stopped .* by SIGTERM; the same command goes on'): toy_tune(out, **options)
    toy_tune(out)
    assert same_files(tuned, out)

CHAIN = [dict(stop_epoch=1), dict(sample_epoch=1), dict(stop_epoch=3), dict(sample_epoch=3), dict(sample_epoch=0), {}]

def tune_in_parts(out):
    for part in CHAIN: toy_tune(out, **part)

def check_kills_in_a_chain(tuned, folder, n_kills, seed=0):
    "kill -9 at a file operation; then all jobs again"
    differing = run_with_kills(tune_in_parts, folder, n_kills, seed)
    assert len(differing)==n_kills and differing=={moment: [] for moment in differing}
    assert differing_files(tuned, folder/'undisturbed'/'out')==[]

def test_kills_in_a_chain(tuned, tmp_path): check_kills_in_a_chain(tuned, tmp_path, 5)

@pytest.mark.long('kills, a minute')
def test_many_kills_in_a_chain(tuned, tmp_path): check_kills_in_a_chain(tuned, tmp_path, N_KILLS, seed=1)

@pytest.mark.long('six trainings and samplings of a small SDXL, 10 s')
def test_parts_of_sdxl(tmp_path):
    "With a real U-Net, text encoders and sampler"
    options = dict(QUICK_SDXL, base_model='tiny-sdxl-random', checkpoint_every=1, epochs=2)
    train_sdxl(TOY, PAIRS, tmp_path/'one'/'out', **options)
    for part in (dict(stop_epoch=1), dict(stop_epoch=2), dict(sample_epoch=2), dict(sample_epoch=0), {}):
        train_sdxl(TOY, PAIRS, tmp_path/'parts'/'out', **options, **part)
    assert differing_files(tmp_path/'one'/'out', tmp_path/'parts'/'out')==[]

if __name__=='__main__':
    training.torch.set_num_threads(1)
    try: globals()[sys.argv[1]](*sys.argv[2:])
    except TrainingStopped as e:
        print(e)
        sys.exit(75)

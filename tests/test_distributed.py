"""Two processes against one: Adafactor on sharded weights (FSDP2), and whole trainings in float64;
stochastic rounding after the step, in every path. Started by torchrun, this file is what each
process does"""
import importlib, json, multiprocessing, os, re, socket, subprocess, sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import pandas as pd, pytest, torch
import torch.distributed as dist
from safetensors.torch import load_file
from conftest import sh
from elbowsynth.diffusion.adafactor import Adafactor

LR = 1e-3 # Learning rate of the trainings
# A constant added to all keys of an attention changes nothing: this bias has a gradient of zero but
# for rounding errors, and Adafactor scales whatever it is to a full step
NO_GRADIENT = ('self_attn.k_proj.bias',)

def run_by_torchrun(function, *args, n=2):
    "Run a function of this file in `n` processes, as users start them"
    torchrun = [sys.executable, '-m', 'torch.distributed.run', '--standalone']
    sh(*torchrun, f'--nproc_per_node={n}', __file__, function, *args, OMP_NUM_THREADS='1',
       timeout=600)

def run_as_rank(rank, n, port, function, args):
    "What torchrun sets for a process, then the function of this file"
    os.environ |= {'RANK': str(rank), 'LOCAL_RANK': str(rank), 'WORLD_SIZE': str(n),
                   'LOCAL_WORLD_SIZE': str(n), 'MASTER_ADDR': '127.0.0.1',
                   'MASTER_PORT': str(port)}
    torch.set_num_threads(1)
    globals()[function](*args)

def run_by_fork(function, *args, n=2):
    "The same in `n` copies of this process, which need not import the heavy packages again"
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    context = multiprocessing.get_context('fork')
    processes = [context.Process(target=run_as_rank, args=(rank, n, port, function, args))
                 for rank in range(n)]
    for p in processes: p.start()
    for p in processes: p.join(600)
    exit_codes = [p.exitcode for p in processes]
    for p in processes: p.kill()
    assert exit_codes==[0]*n, f'exit codes of the processes: {exit_codes}'

# Adafactor alone

class Layers(torch.nn.ModuleDict):
    "Layers of several kinds, with rows that two processes cannot share evenly"
    def forward(self): pass

def make_layers(dtype):
    torch.manual_seed(0)
    layers = {'line': torch.nn.Linear(6, 5), 'conv': torch.nn.Conv2d(3, 5, 3),
              'words': torch.nn.Embedding(7, 4), 'norm': torch.nn.LayerNorm(3),
              'one': torch.nn.Linear(4, 1)}
    return Layers(layers).to(dtype)

def train_layers(net, optimizer, n_steps, start=0, backward=False):
    "Steps with gradients that depend on the step and the parameter alone"
    from torch.distributed.tensor import distribute_tensor
    for t in range(start, start+n_steps):
        for i,p in enumerate(net.parameters()):
            generator = torch.Generator().manual_seed(100*t+i)
            grad = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            grad = grad.to(p.dtype)*10.**(t-2)
            if backward: (p*grad).sum().backward()
            elif hasattr(p, 'placements'):
                p.grad = distribute_tensor(grad, p.device_mesh, p.placements)
            else: p.grad = grad
        optimizer.step()
        optimizer.zero_grad()
    return net

OPTIONS = {'default': {}, 'decay': dict(weight_decay=.1, clip_threshold=.5, decay_rate=-.5),
           'scaled': dict(scale_parameter=True),
           'relative': dict(lr=None, relative_step=True, warmup_init=True,
                            scale_parameter=True)}

def make_optimizer(net, options):
    options = {'lr': 1e-2}|options
    return Adafactor(net.parameters(), **options, stochastic_rounding=True, seed=3)

def check_sharded_steps(name, dtype, mesh):
    "Sharded weights take the same steps as whole ones, also after resuming"
    from torch.distributed.fsdp import fully_shard
    whole, sharded = make_layers(dtype), fully_shard(make_layers(dtype), mesh=mesh)
    optimizer = make_optimizer(whole, OPTIONS[name])
    interrupted = make_optimizer(sharded, OPTIONS[name])
    train_layers(whole, optimizer, 5)
    train_layers(sharded, interrupted, 3)
    resumed = make_optimizer(sharded, OPTIONS[name])
    resumed.load_state_dict(interrupted.state_dict())
    train_layers(sharded, resumed, 2, start=3)

    params = zip(whole.parameters(), sharded.parameters(), strict=True)
    weight_error = max((p-q.full_tensor()).abs().max().item() for p,q in params)
    expected, state = optimizer.state_dict()['state'], resumed.state_dict()['state']
    assert not any(hasattr(v, 'placements') for s in state.values() for v in s.values())
    assert {s['step'] for s in state.values()}=={5}
    state_errors = []
    for i,tensors in expected.items():
        for k,t in tensors.items():
            if k!='step': state_errors.append(((t-state[i][k]).abs()/t.abs()).max().item())
    tolerance = 1e-12 if dtype==torch.float64 else 1e-6
    state_error = max(state_errors)
    assert weight_error<=1e-12, (name, dtype, weight_error)
    assert state_error<=tolerance, (name, dtype, state_error)

def check_sharded_rounding(mesh):
    "Stochastic rounding is unbiased after the step, with other bits in each shard"
    from torch.distributed.fsdp import fully_shard
    net = fully_shard(Layers({'w': torch.nn.Linear(400, 500, bias=False).bfloat16()}), mesh=mesh)
    optimizer = Adafactor(net.parameters(), 1e-5, stochastic_rounding=True)
    for p in net.parameters():
        torch.nn.init.constant_(p, .02)
        p.grad = torch.ones_like(p)
    optimizer.step()
    moved = (net['w'].weight.full_tensor().float()<.02).float()
    assert abs(moved.mean()-.0819)<3e-3 and (moved[:250]!=moved[250:]).any(), moved.mean()

def adafactor_in_two(out):
    "What each process does; the first writes which cases passed"
    from torch.distributed.device_mesh import init_device_mesh
    dist.init_process_group('gloo')
    mesh = init_device_mesh('cpu', (2,))
    for dtype in (torch.float64, torch.bfloat16):
        for name in OPTIONS:
            check_sharded_steps(name, dtype, mesh)
            if dist.get_rank()==0: (Path(out)/f'{name} {dtype}').touch()
    check_sharded_rounding(mesh)
    dist.destroy_process_group()

def test_adafactor_on_sharded_weights_equals_that_on_whole_ones(tmp_path):
    run_by_fork('adafactor_in_two', tmp_path)
    passed = {p.name for p in tmp_path.iterdir()}
    assert passed=={f'{name} torch.{dtype}' for name in OPTIONS for dtype in ('float64', 'bfloat16')}

def test_rounding_is_unbiased_in_step_and_in_backward_pass():
    start, results = torch.full((300, 700), .02).bfloat16(), []
    for in_backward in (False, True):
        w = torch.nn.Parameter(start.clone())
        optimizer = Adafactor([w], 1e-5, stochastic_rounding=True)
        if in_backward: optimizer.fuse_backward()
        w.sum().backward()
        assert (w.grad is None)==in_backward
        optimizer.step()
        results.append(w.detach())
    assert torch.equal(*results) and abs((results[0].float()<.02).float().mean()-.0819)<3e-3
    nearest = torch.nn.Parameter(start.clone())
    nearest.grad = torch.ones_like(nearest)
    Adafactor([nearest], 1e-5).step()
    assert torch.equal(nearest, start)

def test_updates_in_the_backward_pass_are_bit_identical():
    for dtype in (torch.float32, torch.bfloat16):
        stepped, hooked = make_layers(dtype), make_layers(dtype)
        optimizers = [Adafactor(net.parameters(), 1e-2, stochastic_rounding=True)
                      for net in (stepped, hooked)]
        optimizers[1].fuse_backward()
        train_layers(stepped, optimizers[0], 4)
        train_layers(hooked, optimizers[1], 4, backward=True)
        params = zip(stepped.parameters(), hooked.parameters(), strict=True)
        assert all(torch.equal(p, q) for p,q in params)

@pytest.mark.long('compiles with the C compiler')
def test_compiled_adafactor_gives_the_same_weights():
    for dtype,tolerance in ((torch.float32, 1e-7), (torch.bfloat16, 0)):
        eager, compiled = make_layers(dtype), make_layers(dtype)
        for net,compile in ((eager, False), (compiled, True)):
            optimizer = Adafactor(net.parameters(), 1e-2, stochastic_rounding=True, compile=compile)
            train_layers(net, optimizer, 4)
        params = zip(eager.parameters(), compiled.parameters(), strict=True)
        errors = torch.cat([(p-q).abs().float().flatten() for p,q in params])
        # A sum in another order may round differently
        assert (errors>tolerance).float().mean()<.01, errors.max()

# Whole trainings

def model_function(prefix, model):
    module = importlib.import_module(f'elbowsynth.diffusion.{model}')
    return getattr(module, f'{prefix}_{model}')

def train(model, out, epochs=5, **options):
    "Five steps in float64 with gradient checkpointing; one test pair is sampled"
    from elbowsynth.diffusion.latents import InpaintDataset, toy_data
    pairs = toy_data(4)
    test = InpaintDataset(*(field[:1] for field in pairs))
    return model_function('train', model)(
        pairs, test, out, base_model=str(Path(out).parent/'base'), weight_dtype='float64',
        vae_dtype='float64', epochs=epochs, checkpoint_every=5, boost_epochs=0, batch_size=4,
        lr=LR, text_encoder_lr=LR, num_inference_steps=2, n_validation=0,
        unmasked_probability=.3, device='cpu', ema_decay=.5, **options)

def save_base_model(model, folder):
    "A small base model without dropout, for which each process would draw its own random numbers"
    pipe = model_function('load', model)(f'tiny-{model}-random')
    for net in (pipe.text_encoder, pipe.text_encoder_2):
        if hasattr(net.config, 'dropout_rate'): net.config.dropout_rate = 0.
    pipe.save_pretrained(folder)

def train_in_two(out, *models):
    "What each process does: replicated, sharded, and sharded with a resumption after three steps"
    for model in models:
        train(model, Path(out)/model/'replicated')
        train(model, Path(out)/model/'sharded', fsdp=True)
        for epochs in (3, 5): train(model, Path(out)/model/'resumed', epochs, fsdp=True)

def weights(out):
    checkpoint = load_file(Path(out)/'checkpoint.safetensors')
    return {k: v for k,v in checkpoint.items() if not k.startswith(('optimizer/', 'rng/'))}

@pytest.fixture(scope='module', params=['sdxl', pytest.param('flux', marks=pytest.mark.long('trains in two processes, 40 s'))])
def trained(request, tmp_path_factory):
    "A model's weights: from one process, and from two in each mode"
    model, out = request.param, tmp_path_factory.mktemp(request.param)
    save_base_model(model, out/model/'base')
    run = run_by_fork if model=='sdxl' else run_by_torchrun
    run('train_in_two', out, model)
    train(model, out/model/'one')
    return {mode: weights(out/model/mode) for mode in ('one', 'replicated', 'sharded', 'resumed')}

def differences(a, b):
    "Largest difference of each tensor, in learning rates"
    return {k: (a[k]-b[k]).abs().max().item()/LR for k in a if not k.endswith(NO_GRADIENT)}

def split_ema(tensors):
    "Weights, and averaged weights"
    ema = {k: v for k,v in tensors.items() if k.startswith('ema/')}
    return {k: v for k,v in tensors.items() if k not in ema}, ema

@pytest.mark.long('four trainings of two processes, 80 s')
@pytest.mark.parametrize('mode', ['replicated', 'sharded', 'resumed'])
def test_two_processes_train_as_one(trained, mode):
    (one, one_ema), (two, two_ema) = split_ema(trained['one']), split_ema(trained[mode])
    assert one.keys()==two.keys() and {v.dtype for v in one.values()}=={torch.float64}
    errors = differences(one, two)
    assert max(errors.values())<1e-6, sorted(((v, k) for k,v in errors.items()), reverse=True)[:9]
    assert one_ema and one_ema.keys()==two_ema.keys()
    assert max(differences(one_ema, two_ema).values())<1e-2             # averages are in float32

def test_weights_move_by_more_than_the_tolerance(trained):
    "By about five steps, so that a process that trains on other samples would be noticed"
    zeros = {k: torch.zeros_like(v) for k,v in trained['one'].items()}
    assert max(differences(trained['one'], zeros).values())>1

# The launcher of the stages

def write_study(folder, model):
    "A run with four pairs, split, masks and images, and a base model next to it"
    from elbowsynth.data.images import write_png
    from elbowsynth.diffusion.latents import toy_data
    pairs = toy_data(4)
    rows = []
    for k,(name, image, mask, caption) in enumerate(zip(*pairs)):
        write_png(folder/'images'/f'{name}.png', image)
        write_png(folder/'masks'/f'{name}__normal.png', mask)
        rows.append((f'{name}__normal', name, ['train', 'train', 'train', 'test'][k], caption))
    (folder/'split').mkdir()
    table = pd.DataFrame(rows, columns=['pair', 'image', 'split', 'caption'])
    table.to_csv(folder/'split'/'pairs.csv', index=False)
    save_base_model(model, folder/'base')
    return folder

# Five steps of four images in float64; the sampled pair is the same in all
SETTINGS = dict(
    weight_dtype='float64', vae_dtype='float64', epochs=6, checkpoint_every=6, boost_epochs=0, batch_size=4, lr=LR,
    text_encoder_lr=LR, num_inference_steps=2, n_validation=1, unmasked_probability=.3, device='cpu', cache_latents=False)

def launch(run, out, n_gpus=1, **options):
    "What the cell of the stage does"
    from elbowsynth.diffusion.finetune import launch_training, uses_launcher
    assert uses_launcher(n_gpus, 'cpu')
    settings = SETTINGS | {'base_model': str(run/'base')} | options
    launch_training('sdxl', run, ('split', 'masks', 'images'), 64, run/out, n_gpus, **settings)

@pytest.fixture(scope='module')
def study(tmp_path_factory):
    "Five steps by one process"
    from elbowsynth.diffusion.latents import load_inpaint_data
    from elbowsynth.diffusion.sdxl import train_sdxl
    run = write_study(tmp_path_factory.mktemp('study'), 'sdxl')
    train_sdxl(*load_inpaint_data(run, 'split', 'masks', 'images', 64), run/'one', base_model=str(run/'base'), **SETTINGS)
    return run

def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]

def assert_trained_as_one(study, out):
    one, two = weights(study/'one'), weights(study/out)
    assert one.keys()==two.keys() and {v.dtype for v in one.values()}=={torch.float64}
    assert max(differences(one, two).values())<1e-6
    steps = [[json.loads(line)['step'] for line in (study/name/'log.jsonl').read_text().splitlines()] for name in ('one', out)]
    assert steps==[[1, 2, 3, 4, 5]]*2
    images = [{p.relative_to(study/name): p.read_bytes() for p in (study/name).rglob('*.png')} for name in ('one', out)]
    assert images[0].keys()==images[1].keys() and len(images[0])==4

@pytest.mark.long('four processes that import torch, 30 s')
def test_two_nodes_train_as_one_process(study, monkeypatch):
    "The same call on each node, which meet by the variables of the environment"
    monkeypatch.setenv('ELBOWSYNTH_N_NODES', '2')
    monkeypatch.setenv('ELBOWSYNTH_RENDEZVOUS', f'127.0.0.1:{free_port()}')
    with ThreadPoolExecutor(2) as nodes:
        for node in [nodes.submit(launch, study, 'nodes') for _ in range(2)]: node.result(timeout=300)
    assert_trained_as_one(study, 'nodes')

@pytest.mark.long('three starts of two processes, 60 s')
def test_sigterm_stops_all_processes_after_one_step(study, tmp_path):
    "SIGTERM to the process of the stage; then the same call, and a job that samples"
    code = f'''
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
import builtins, os, signal, test_distributed
from pathlib import Path
from elbowsynth.training import TrainingStopped
said = print
def stop_at_start(*args, **kwargs):
    said(*args, **kwargs)
    if 'starts at step 0 of 5' in args[0]: os.kill(os.getpid(), signal.SIGTERM)
builtins.print = stop_at_start
try: test_distributed.launch(Path({str(study)!r}), 'stopped', 2, stop_epoch=6)
except TrainingStopped as e: raise SystemExit(f'STOPPED {{e}}')
'''
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=300, env=os.environ | {'OMP_NUM_THREADS': '1'})
    stopped = re.search(r'STOPPED stopped: stopped at step (\d) of 5 by SIGTERM; the same command goes on', done.stderr)
    assert stopped, done.stdout[-2000:]+done.stderr[-3000:]
    launch(study, 'stopped', 2, stop_epoch=6)
    assert sorted(p.name for p in (study/'stopped'/'checkpoints').iterdir())==['0000.safetensors', '0006.safetensors']
    launch(study, 'stopped', 2)
    assert_trained_as_one(study, 'stopped')

@pytest.mark.long('starts two processes, 10 s')
def test_an_error_in_a_process_is_shown(study):
    with pytest.raises(RuntimeError, match='refused: a process of the training ended with 1; .*fix:'):
        launch(study, 'refused', 2, lr_scheduler='cubic')
    assert not (study/'refused').exists()

if __name__=='__main__': globals()[sys.argv[1]](*sys.argv[2:])

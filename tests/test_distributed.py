"Two processes against one: Adafactor on weights that are cut over them (FSDP2), and whole trainings, in float64; rounding after the step in every path. Run by torchrun, this file is what the processes do"
import os, sys
from pathlib import Path
import pytest, torch
import torch.distributed as dist
from safetensors.torch import load_file
from conftest import ROOT, sh
from elbowsynth.diffusion.adafactor import Adafactor

RATE = 1e-3 # Of the trainings
# Adding a number to all keys of an attention changes nothing, so this bias' gradient is zero but for the last bits, and Adafactor makes a whole step of whatever is there
NO_GRADIENT = ('self_attn.k_proj.bias',)

def launch(*args, n=2):
    "This file in `n` processes"
    return sh(sys.executable, '-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={n}', __file__, *args, OMP_NUM_THREADS='1', timeout=600).stdout

# Adafactor alone

class Bag(torch.nn.ModuleDict):
    "Weights of all kinds, with rows that two processes cannot share evenly"
    def forward(self): pass

def bag(dtype):
    torch.manual_seed(0)
    return Bag({'line': torch.nn.Linear(6, 5), 'conv': torch.nn.Conv2d(3, 5, 3), 'words': torch.nn.Embedding(7, 4), 'norm': torch.nn.LayerNorm(3), 'one': torch.nn.Linear(4, 1)}).to(dtype)

def steps(net, opt, k, start=0, backward=False):
    "Steps with gradients that depend on the step and the parameter alone"
    from torch.distributed.tensor import distribute_tensor
    for t in range(start, start+k):
        for i,p in enumerate(net.parameters()):
            full = torch.randn(p.shape, generator=torch.Generator().manual_seed(100*t+i), dtype=torch.float64).to(p.dtype)*10.**(t-2)
            if backward: (p*full).sum().backward()
            else: p.grad = distribute_tensor(full, p.device_mesh, p.placements) if hasattr(p, 'placements') else full
        opt.step(), opt.zero_grad()
    return net

OPTIONS = {'plain': {}, 'decay': dict(weight_decay=.1, clip_threshold=.5, decay_rate=-.5), 'scaled': dict(scale_parameter=True),
           'relative': dict(lr=None, relative_step=True, warmup_init=True, scale_parameter=True)}

def adafactor_in_two(_):
    "What each process does: the whole and the cut weights take the same steps, and the cut ones go on from a checkpoint, too"
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    dist.init_process_group('gloo')
    mesh = init_device_mesh('cpu', (2,))
    for dtype in (torch.float64, torch.bfloat16):
        for name,o in OPTIONS.items():
            make = lambda net: Adafactor(net.parameters(), **{'lr': 1e-2} | o, stochastic_rounding=True, seed=3)
            one, two = bag(dtype), fully_shard(bag(dtype), mesh=mesh)
            opt_one, opt_two = make(one), make(two)
            steps(one, opt_one, 5), steps(two, opt_two, 3)
            opt_three = make(two)
            opt_three.load_state_dict(opt_two.state_dict())
            steps(two, opt_three, 2, 3)
            apart = max((p-q.full_tensor()).abs().max().item() for p,q in zip(one.parameters(), two.parameters(), strict=True))
            whole, gathered = opt_one.state_dict()['state'], opt_three.state_dict()['state']
            assert not any(hasattr(v, 'placements') for s in gathered.values() for v in s.values())
            drift = max(((whole[i][k]-gathered[i][k]).abs()/whole[i][k].abs()).max().item() for i in whole for k in whole[i] if k!='step')
            assert {s['step'] for s in gathered.values()}=={5}
            assert apart<=1e-12 and drift<=(1e-12 if dtype==torch.float64 else 1e-6), (name, dtype, apart, drift)
            if dist.get_rank()==0: print(f'{name} {dtype}: {apart:.0e}')
    w = fully_shard(Bag({'w': torch.nn.Linear(400, 500, bias=False).bfloat16()}), mesh=mesh)
    opt = Adafactor(w.parameters(), 1e-5, stochastic_rounding=True)
    for p in w.parameters():
        torch.nn.init.constant_(p, .02)
        p.grad = torch.ones_like(p)
    opt.step()
    moved = (w['w'].weight.full_tensor().float()<.02).float()
    assert abs(moved.mean()-.0819)<3e-3 and (moved[:250]!=moved[250:]).any(), moved.mean()         # unbiased after the step, by other bits in each half
    dist.destroy_process_group()

def test_adafactor_on_cut_weights_is_the_whole_ones():
    said = launch('adafactor_in_two', '-')
    assert said.count('torch.float64')==said.count('torch.bfloat16')==len(OPTIONS), said

def test_rounding_is_unbiased_after_the_step_in_one_process_and_in_the_backward_pass():
    start, ends = torch.full((300, 700), .02).bfloat16(), []
    for backward in (False, True):
        w = torch.nn.Parameter(start.clone())
        opt = Adafactor([w], 1e-5, stochastic_rounding=True)
        if backward: opt.fuse_backward()
        w.sum().backward()
        assert (w.grad is None)==backward
        opt.step()
        ends.append(w.detach())
    assert torch.equal(*ends) and abs((ends[0].float()<.02).float().mean()-.0819)<3e-3
    nearest = torch.nn.Parameter(start.clone())
    nearest.grad = torch.ones_like(nearest)
    Adafactor([nearest], 1e-5).step()
    assert torch.equal(nearest, start)

def test_updates_in_the_backward_pass_are_the_same():
    for dtype in (torch.float32, torch.bfloat16):
        plain, hooked = bag(dtype), bag(dtype)
        opts = [Adafactor(net.parameters(), 1e-2, stochastic_rounding=True) for net in (plain, hooked)]
        opts[1].fuse_backward()
        steps(plain, opts[0], 4), steps(hooked, opts[1], 4, backward=True)
        assert all(torch.equal(p, q) for p,q in zip(plain.parameters(), hooked.parameters(), strict=True))

@pytest.mark.long('compiles with the C compiler')
def test_fused_by_a_compiler_is_the_same():
    for dtype,eps in ((torch.float32, 1e-7), (torch.bfloat16, 0)):
        plain, fused = bag(dtype), bag(dtype)
        for net,fuse in ((plain, False), (fused, True)): steps(net, Adafactor(net.parameters(), 1e-2, stochastic_rounding=True, compile=fuse), 4)
        far = torch.cat([(p-q).abs().float().flatten() for p,q in zip(plain.parameters(), fused.parameters(), strict=True)])
        assert (far>eps).float().mean()<.01, far.max()                  # a sum in another order may round another way

# Whole trainings

def train(model, out, epochs=5, **more):
    "Five steps of a small model with every part in float64, recomputation included; a film of one test pair is drawn"
    from elbowsynth.diffusion.latents import toy_data
    from elbowsynth.diffusion.latents import InpaintDataset
    import importlib
    pairs = toy_data(4)
    tune = getattr(importlib.import_module(f'elbowsynth.{model}'), f'train_{model}')
    return tune(pairs, InpaintDataset(*(o[:1] for o in pairs)), out, base=str(Path(out).parent/'base'), dtype='float64', vae_dtype='float64', epochs=epochs, every=5, boost_epochs=0, batch=4, lr=RATE, text_lr=RATE,
                steps=2, validate=0, unmasked_probability=.3, device='cpu', ema=.5, **more)

def base_of(model, folder):
    "A small base without dropout, which every process draws for its own films"
    import importlib
    pipe = getattr(importlib.import_module(f'elbowsynth.{model}'), f'load_{model}')(f'tiny-{model}-random')
    for net in (pipe.text_encoder, pipe.text_encoder_2):
        if hasattr(net.config, 'dropout_rate'): net.config.dropout_rate = 0.
    pipe.save_pretrained(folder)

def train_in_two(out, *models):
    "What each process does: replicas, shares, and shares that go on after three steps"
    for model in models:
        train(model, Path(out)/model/'replicas')
        train(model, Path(out)/model/'shares', shard=True)
        for epochs in (3, 5): train(model, Path(out)/model/'resumed', epochs, shard=True)

def weights(out): return {k: v for k,v in load_file(Path(out)/'checkpoint.safetensors').items() if not k.startswith(('optimizer/', 'random/'))}

@pytest.fixture(scope='module', params=['sdxl', 'flux'])
def trained(request, tmp_path_factory):
    "A model's weights: one process, and each way of two"
    out = tmp_path_factory.mktemp(request.param)
    base_of(request.param, out/request.param/'base')
    launch('train_in_two', out, request.param)
    train(request.param, out/request.param/'one')
    return {k: weights(out/request.param/k) for k in ('one', 'replicas', 'shares', 'resumed')}

def apart(a, b): return {k: (a[k]-b[k]).abs().max().item()/RATE for k in a if not k.endswith(NO_GRADIENT)}

@pytest.mark.parametrize('way', ['replicas', 'shares', 'resumed'])
def test_two_processes_train_as_one(trained, way):
    (one, mean), (two, mean_two) = ([{k: v for k,v in trained[w].items() if k.startswith('ema/')==e} for e in (False, True)] for w in ('one', way))
    assert one.keys()==two.keys() and {v.dtype for v in one.values()}=={torch.float64}
    far = apart(one, two)
    assert max(far.values())<1e-6, sorted(((v, k) for k,v in far.items()), reverse=True)[:9]        # in steps of the learning rate
    assert mean and mean.keys()==mean_two.keys() and max(apart(mean, mean_two).values())<1e-2       # running means are in float32

def test_the_difference_would_be_seen(trained):
    "Weights have moved by about five steps, so that a rank that trains on other films shows"
    far = apart(trained['one'], {k: v*0 for k,v in trained['one'].items()})
    assert max(far.values())>1

if __name__=='__main__': globals()[sys.argv[1]](*sys.argv[2:])

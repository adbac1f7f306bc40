"""The diffusion arm: our Adafactor against that of transformers, training steps with and without kept latents, and on a GPU both models at their real size.

    python bench/diffusion.py [--quick] [--out FOLDER] [--parts optimizer cached full]

`--quick` shrinks everything, to see that it runs, and writes nothing unless --out is given. Full-size models have random weights: what is computed does not depend on them. What needs a GPU is
`unmeasured` where there is none. Both ways of a pair take turns in one process, so that a busy machine disturbs both alike; figures are medians."""
import argparse, statistics, tempfile, time
from pathlib import Path
import torch
from torch.utils.flop_counter import FlopCounterMode
from elbowsynth.diffusion.adafactor import Adafactor
from elbowsynth.diffusion.objective import masked_mse
from elbowsynth.diffusion.model_sizes import count_params, meta_model, MODEL_CONFIGS
from results import keep

CUDA = torch.cuda.is_available()
PEAK = {'H100': {'bfloat16': 989.4e12, 'float32': 494.7e12}, 'H200': {'bfloat16': 989.4e12, 'float32': 494.7e12}, 'A100': {'bfloat16': 312e12, 'float32': 156e12}} # Operations a second, dense; float32 as TF32
BANDWIDTH = {'H100': 3.35e12, 'H200': 4.8e12, 'A100': 2.0e12} # Bytes a second, SXM cards
# Weights in the proportions of the models: a transformer block of FLUX, and a stage of SDXL's U-Net with its convolutions
SHAPES = {'flux': [(9216, 3072), (9216,), (3072, 3072), (12288, 3072), (12288,), (3072,), (3072, 5120)], 'sdxl': [(1280, 1280, 3, 3), (1280,), (10240, 1280), (1280, 5120), (640, 640, 3, 3), *[(1280, 1280)]*8, (640, 320, 3, 3)]}

def known(table):
    "What is known of this GPU; None for another one"
    return next((v for k,v in table.items() if CUDA and k in torch.cuda.get_device_name()), None)

def seconds(f):
    "Of one call, with all that it started on a GPU"
    if CUDA: torch.cuda.synchronize()
    start = time.perf_counter()
    f()
    if CUDA: torch.cuda.synchronize()
    return time.perf_counter()-start

def taking_turns(ways, repeats):
    "Name to median seconds; a first round does not count"
    seen = {k: [] for k in ways}
    for _ in range(repeats+1):
        for k,f in ways.items(): seen[k].append(seconds(f))
    return {k: statistics.median(v[1:]) for k,v in seen.items()}

# The optimizer

def weights_like(shapes, most, dtype):
    "About `most` weights with gradients, in layers of these shapes over and over"
    device, params, n = 'cuda' if CUDA else 'cpu', [], 0
    while n<most:
        for shape in shapes:
            p = torch.nn.Parameter(torch.randn(shape, device=device).mul_(.02).to(dtype))
            p.grad = torch.randn(shape, device=device).mul_(1e-3).to(dtype)
            params.append(p)
            n += p.numel()
    return params

def optimizer_rows(quick, repeats):
    "A step of ours and of transformers', on weights of the same kind"
    from transformers.optimization import Adafactor as Theirs
    rows = []
    for model,dtype,rounding in (('flux', torch.float32, False), ('flux', torch.bfloat16, False), ('flux', torch.bfloat16, True), ('sdxl', torch.float32, False)):
        shapes = [tuple(max(1, s//8) if s>8 else s for s in shape) for shape in SHAPES[model]] if quick else SHAPES[model]
        params = weights_like(shapes, 1e6 if quick else 1e8, dtype)
        n = sum(p.numel() for p in params)
        ours, theirs = Adafactor(params, 1e-5, stochastic_rounding=rounding), Theirs(params, lr=1e-5, scale_parameter=False, relative_step=False)
        took = taking_turns({'ours': ours.step, 'theirs': theirs.step}, repeats)
        wide, speed = 4 if dtype==torch.float32 else 2, known(BANDWIDTH)
        rows.append({'weights like': model, 'type': str(dtype).split('.')[1]+(', rounded at random' if rounding else ''), 'millions': n/1e6, 'ours, ms': 1e3*took['ours'], "transformers', ms": 1e3*took['theirs'],
                     'times faster': took['theirs']/took['ours'], 'times the floor of three passes': took['ours']/(3*wide*n/speed) if speed else 'unmeasured'})
        print(rows[-1], flush=True)
    return rows

# Kept latents

def step_seconds(log):
    "Median of the steps after the first pass, from the mean time a step that a log holds"
    from elbowsynth.training import read_log
    at = (t := read_log(log)).seconds*t.step
    return float(at.diff().iloc[len(at)//3:].median())

def cached_rows(quick, repeats):
    "A training step of the small models with latents kept and computed anew"
    from elbowsynth.diffusion import flux, sdxl
    from elbowsynth.diffusion.latents import toy_data
    from elbowsynth.training import read_log
    rows, size = [], 64 if quick else 128
    pairs = toy_data(8, size)
    few = type(pairs)(*(o[:1] for o in pairs))
    for tune,base in ((sdxl.train_sdxl, 'tiny-sdxl'), (flux.train_flux, 'tiny-flux')):
        with tempfile.TemporaryDirectory() as folder:
            seen = {True: [], False: []}
            for i in range(repeats):
                for cache in seen:
                    out = Path(folder)/str(cache)/str(i)
                    tune(pairs, few, out, base=base+'-random'*quick, dtype='float32', epochs=3 if quick else 10, every=100, boost_epochs=0, batch=4, steps=1, validate=0, cache=cache, unmasked_probability=.1)
                    seen[cache].append(step_seconds(out/'log.jsonl'))
            kept, anew = (1e3*statistics.median(seen[k]) for k in (True, False))
            rows.append({'model': base, 'side': size, 'kept, ms a step': kept, 'anew, ms a step': anew, 'times faster': anew/kept})
            print(rows[-1], flush=True)
    return rows

# Real sizes

QUICK = {'unet': dict(block_out_channels=(32, 64, 64), transformer_layers_per_block=(1, 1, 1), attention_head_dim=(1, 2, 2), cross_attention_dim=64, projection_class_embeddings_input_dim=6*256+32),
         'transformer': dict(num_layers=1, num_single_layers=1, num_attention_heads=2, attention_head_dim=128, joint_attention_dim=64, pooled_projection_dim=32),
         'text_encoder': dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2),
         'text_encoder_2': {'sdxl': dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, projection_dim=32), 'flux': dict(d_model=64, d_ff=64, num_layers=2, num_heads=2)}}

def filled(model, dtype, quick):
    "The nets of a model with random weights, on the GPU if there is one; the autoencoder is not part of a step with kept latents"
    nets = {}
    for name,(kind,settings) in MODEL_CONFIGS[model].items():
        if name=='vae': continue
        small = QUICK[name][model] if name=='text_encoder_2' else QUICK[name]
        net = meta_model(kind, settings | small if quick else settings).to(dtype).to_empty(device='cuda' if CUDA else 'cpu')
        with torch.no_grad():
            for n,p in net.named_parameters(): p.fill_(1) if n.endswith('norm.weight') else p.normal_(std=.02)
            for b in net.buffers(): b.copy_(torch.arange(b.numel()).view(b.shape)) if not b.is_floating_point() else b.zero_()
        if hasattr(net, 'tie_weights'): net.tie_weights()               # T5's words, which to_empty made two of
        (getattr(net, 'enable_gradient_checkpointing', None) or net.gradient_checkpointing_enable)()
        nets[name] = net.train()
    return nets

def step_of(model, nets, dtype, batch, cells, length):
    "A function that takes one training step as in `train_sdxl` and `train_flux`: text encoders, the net, the masked loss, backward, Adafactor"
    device, numbers = 'cuda' if CUDA else 'cpu', torch.Generator().manual_seed(0)
    rand = lambda *shape: torch.randn(shape, generator=numbers).to(device, dtype)
    words = lambda n, net: torch.randint(3, min(1000, net.config.vocab_size), (batch, n), generator=numbers).to(device)
    opt = Adafactor([p for net in nets.values() for p in net.parameters()], 1e-5, stochastic_rounding=dtype==torch.bfloat16)
    one, two = nets['text_encoder'], nets['text_encoder_2']
    if model=='sdxl':
        inner, target, mask = rand(batch, 9, cells, cells), rand(batch, 4, cells, cells), torch.ones(batch, 1, cells, cells, device=device)
        first, second, t, ids = words(77, one), words(77, two), torch.full((batch,), 500, device=device), rand(batch, 6)
        def predict():
            a, b = one(first, output_hidden_states=True), two(second, output_hidden_states=True)
            text = torch.cat([a.hidden_states[-2], b.hidden_states[-2]], -1)
            return nets['unet'](inner, t, encoder_hidden_states=text, added_cond_kwargs={'text_embeds': b[0], 'time_ids': ids}).sample
    else:
        side = cells//2
        inner, target, mask = rand(batch, side**2, 384), rand(batch, side**2, 64)[:, None], torch.ones(batch, 1, side**2, 1, device=device)
        first, second, t, guidance = words(77, one), words(length, two), torch.full((batch,), .5, device=device, dtype=dtype), torch.full((batch,), 30., device=device)
        img_ids = torch.cartesian_prod(torch.arange(1), torch.arange(side), torch.arange(side)).to(device, dtype)
        def predict():
            return nets['transformer'](hidden_states=inner, timestep=t, guidance=guidance, pooled_projections=one(first).pooler_output, encoder_hidden_states=two(second)[0],
                                       txt_ids=torch.zeros(length, 3, device=device, dtype=dtype), img_ids=img_ids).sample[:, None]
    def step():
        masked_mse(predict(), target, mask).mean().backward()
        opt.step()
        opt.zero_grad()
    return step

def full_rows(quick, repeats):
    "Seconds a step, share of the peak, and memory of both models with all that Table 7 trains"
    rows = []
    for model,dtype in (('sdxl', torch.float32), ('flux', torch.bfloat16)):
        row = {'model': model, 'type': 'TF32' if model=='sdxl' else 'bfloat16', 'side': 64 if quick else 1024, 'batch': 4}
        if CUDA or quick:
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
            nets = filled(model, dtype, quick)
            step = step_of(model, nets, dtype, 4, row['side']//8, 16 if quick else 512)
            with FlopCounterMode(display=False) as flops: step()
            if CUDA: torch.cuda.reset_peak_memory_stats()
            took, peak = taking_turns({'step': step}, repeats)['step'], known(PEAK)
            row |= {'weights, millions': sum(map(count_params, nets.values()))/1e6, 'seconds a step': took, 'Tflop a step': flops.get_total_flops()/1e12,
                    'share of the peak': flops.get_total_flops()/took/peak[str(dtype).split('.')[1]] if peak else 'unmeasured', 'peak memory, GiB': torch.cuda.max_memory_allocated()/2**30 if CUDA else 'unmeasured'}
            del nets, step
            if CUDA: torch.cuda.empty_cache()
        else: row |= {k: 'unmeasured' for k in ('weights, millions', 'seconds a step', 'Tflop a step', 'share of the peak', 'peak memory, GiB')}
        rows.append(row)
        print(row, flush=True)
    return rows

PARTS = {'optimizer': (optimizer_rows, 'Adafactor', "One step of our Adafactor and of transformers', on the same weights and gradients in turns. The floor reads weights and gradients once and writes weights once, at the card's bandwidth: "
                       '6 bytes a weight in bfloat16. Aims: at least twice as fast on a CPU, within four times of the floor on a GPU.'),
         'cached': (cached_rows, 'Kept latents', 'Training steps of the small models, all that a step does, with latents kept on disk and computed in every step.'),
         'full': (full_rows, 'Real sizes', "Both models with random weights and their text encoders, all of it trained, latents kept: 1024 x 1024, batches of 4, T5 at 512 tokens, activations computed twice. The share of the peak counts the operations of the step, "
                  'recomputation included. Aims: 45 %, and FLUX with T5 and CLIP within a card of 80 GB.')}

def main():
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument('--quick', action='store_true', help='shrunken, one repeat: to see that it runs; writes nothing unless --out is given')
    a.add_argument('--out', type=Path, help='folder for the tables, bench/results by default')
    a.add_argument('--repeats', type=int, default=5)
    a.add_argument('--parts', nargs='*', default=list(PARTS), choices=list(PARTS))
    args = a.parse_args()
    torch.manual_seed(0)
    for part in args.parts:
        f, title, words = PARTS[part]
        rows = f(args.quick, 1 if args.quick else args.repeats)
        if not CUDA: words += ' There is no GPU here: what needs one is `unmeasured`.'
        if not args.quick or args.out: keep(f'diffusion-{part}', title, words, rows, about={'torch': torch.__version__, 'threads': torch.get_num_threads(), 'repeats': args.repeats, 'quick': args.quick}, out=args.out)

if __name__=='__main__': main()

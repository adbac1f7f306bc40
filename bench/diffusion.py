"""Benchmarks of the diffusion models: Adafactor against that of transformers, training steps with and without cached latents, and on a GPU both models at their real size.

    python bench/diffusion.py [--quick] [--out FOLDER] [--parts optimizer cached full]

`--quick` makes everything small, to see that it runs, and writes nothing unless --out is given. Full-size models have random weights, which does not change what is computed. What needs a GPU is `unmeasured` where there is none. Both variants of a comparison alternate in one process, so that other load on the machine affects both; numbers are medians."""
import argparse, statistics, tempfile, time
from pathlib import Path
import torch
from torch.utils.flop_counter import FlopCounterMode
from elbowsynth.diffusion.adafactor import Adafactor
from elbowsynth.diffusion.model_sizes import count_params, meta_model, MODEL_CONFIGS
from elbowsynth.diffusion.objective import masked_mse
from results import write_results

CUDA = torch.cuda.is_available()
DEVICE = 'cuda' if CUDA else 'cpu'
# Dense operations per second (float32 as TF32) and bytes per second of SXM cards
PEAK_FLOPS = {'H100': {'bfloat16': 989.4e12, 'float32': 494.7e12}, 'H200': {'bfloat16': 989.4e12, 'float32': 494.7e12},
              'A100': {'bfloat16': 312e12, 'float32': 156e12}}
BANDWIDTH = {'H100': 3.35e12, 'H200': 4.8e12, 'A100': 2.0e12}
# Shapes in the proportions of the models: a transformer block of FLUX, a level of SDXL's U-Net with its convolutions
SHAPES = {
    'flux': [(9216, 3072), (9216,), (3072, 3072), (12288, 3072), (12288,), (3072,), (3072, 5120)],
    'sdxl': [(1280, 1280, 3, 3), (1280,), (10240, 1280), (1280, 5120), (640, 640, 3, 3), *[(1280, 1280)]*8,
             (640, 320, 3, 3)]}

def for_this_gpu(table):
    "The entry of this GPU; None for another one"
    if not CUDA: return None
    return next((v for k,v in table.items() if k in torch.cuda.get_device_name()), None)

def dtype_name(dtype): return str(dtype).split('.')[1]

def seconds(f):
    "Seconds of one call, with all that it started on the GPU"
    if CUDA: torch.cuda.synchronize()
    start = time.perf_counter()
    f()
    if CUDA: torch.cuda.synchronize()
    return time.perf_counter()-start

def median_seconds(variants, repeats):
    "Median seconds of each variant, called in turns; the first round is not counted"
    times = {k: [] for k in variants}
    for _ in range(repeats+1):
        for k,f in variants.items(): times[k].append(seconds(f))
    return {k: statistics.median(v[1:]) for k,v in times.items()}

# The optimizer

def params_with_gradients(shapes, n_weights, dtype):
    "At least `n_weights` weights with gradients, in layers of these shapes"
    params, n = [], 0
    while n<n_weights:
        for shape in shapes:
            p = torch.nn.Parameter(torch.randn(shape, device=DEVICE).mul_(.02).to(dtype))
            p.grad = torch.randn(shape, device=DEVICE).mul_(1e-3).to(dtype)
            params.append(p)
            n += p.numel()
    return params

def optimizer_rows(quick, repeats):
    "An optimizer step of elbowsynth and of transformers, on the same weights"
    from transformers.optimization import Adafactor as ReferenceAdafactor
    settings = [('flux', torch.float32, False), ('flux', torch.bfloat16, False), ('flux', torch.bfloat16, True),
                ('sdxl', torch.float32, False)]
    rows = []
    for model,dtype,stochastic in settings:
        shapes = SHAPES[model]
        if quick: shapes = [tuple(max(1, s//8) if s>8 else s for s in shape) for shape in shapes]
        params = params_with_gradients(shapes, 1e6 if quick else 1e8, dtype)
        n = sum(p.numel() for p in params)
        own = Adafactor(params, 1e-5, stochastic_rounding=stochastic)
        reference = ReferenceAdafactor(params, lr=1e-5, scale_parameter=False, relative_step=False)
        times = median_seconds({'elbowsynth': own.step, 'reference': reference.step}, repeats)
        bytes_per_weight = 4 if dtype==torch.float32 else 2
        bandwidth, minimum = for_this_gpu(BANDWIDTH), 'unmeasured'
        if bandwidth: minimum = times['elbowsynth']/(3*bytes_per_weight*n/bandwidth)
        rows.append({'model': model, 'dtype': dtype_name(dtype)+(', stochastic rounding' if stochastic else ''),
                     'millions': n/1e6, 'elbowsynth_ms': 1e3*times['elbowsynth'],
                     'reference_ms': 1e3*times['reference'], 'speedup': times['reference']/times['elbowsynth'],
                     'relative_to_memory_bandwidth': minimum})
        print(rows[-1], flush=True)
    return rows

# Cached latents

def step_seconds(log):
    "Median duration of a step after the first epoch; the log has the mean duration so far"
    from elbowsynth.training import read_log
    table = read_log(log)
    elapsed = table.seconds_per_step*table.step
    return float(elapsed.diff().iloc[len(elapsed)//3:].median())

def cached_rows(quick, repeats):
    "A training step of the small models, with and without cached latents"
    from elbowsynth.diffusion.flux import train_flux
    from elbowsynth.diffusion.latents import InpaintDataset, toy_data
    from elbowsynth.diffusion.sdxl import train_sdxl
    size = 64 if quick else 128
    data = toy_data(8, size)
    one = InpaintDataset(*(field[:1] for field in data))
    options = dict(weight_dtype='float32', epochs=3 if quick else 10, checkpoint_every=100, boost_epochs=0,
                   batch_size=4, num_inference_steps=1, n_validation=0, unmasked_probability=.1)
    rows = []
    for train,base_model in ((train_sdxl, 'tiny-sdxl'), (train_flux, 'tiny-flux')):
        times = {True: [], False: []}
        with tempfile.TemporaryDirectory() as folder:
            for i in range(repeats):
                for cache in times:
                    out = Path(folder)/str(cache)/str(i)
                    train(data, one, out, base_model=base_model+'-random'*quick, cache_latents=cache, **options)
                    times[cache].append(step_seconds(out/'log.jsonl'))
        cached, uncached = 1e3*statistics.median(times[True]), 1e3*statistics.median(times[False])
        rows.append({'model': base_model, 'size': size, 'cached_ms_per_step': cached,
                     'uncached_ms_per_step': uncached, 'speedup': uncached/cached})
        print(rows[-1], flush=True)
    return rows

# Real sizes

SMALL_CLIP = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
SMALL = {
    'unet': dict(block_out_channels=(32, 64, 64), transformer_layers_per_block=(1, 1, 1),
                 attention_head_dim=(1, 2, 2), cross_attention_dim=64, projection_class_embeddings_input_dim=6*256+32),
    'transformer': dict(num_layers=1, num_single_layers=1, num_attention_heads=2, attention_head_dim=128,
                        joint_attention_dim=64, pooled_projection_dim=32),
    'text_encoder': SMALL_CLIP,
    'text_encoder_2': {'sdxl': dict(SMALL_CLIP, projection_dim=32),
                       'flux': dict(d_model=64, d_ff=64, num_layers=2, num_heads=2)}}

def fill_random(net):
    "Random weights in a network that has none yet"
    with torch.no_grad():
        for name,p in net.named_parameters():
            if name.endswith('norm.weight'): p.fill_(1)
            else: p.normal_(std=.02)
        for buffer in net.buffers():
            if buffer.is_floating_point(): buffer.zero_()
            else: buffer.copy_(torch.arange(buffer.numel()).view(buffer.shape))
    if hasattr(net, 'tie_weights'): net.tie_weights()                   # `to_empty` untied T5's embeddings

def random_models(model, dtype, quick):
    "The trained networks of a model with random weights; with cached latents a step needs no autoencoder"
    models = {}
    for name,(class_name,settings) in MODEL_CONFIGS[model].items():
        if name=='vae': continue
        small = SMALL[name][model] if name=='text_encoder_2' else SMALL[name]
        net = meta_model(class_name, settings | small if quick else settings).to(dtype).to_empty(device=DEVICE)
        fill_random(net)
        if hasattr(net, 'enable_gradient_checkpointing'): net.enable_gradient_checkpointing()
        else: net.gradient_checkpointing_enable()
        models[name] = net.train()
    return models

def random_tokens(n_images, length, text_encoder, generator):
    most = min(1000, text_encoder.config.vocab_size)
    return torch.randint(3, most, (n_images, length), generator=generator).to(DEVICE)

def sdxl_prediction(models, rand, generator, batch_size, side):
    "A function that predicts, its target and a loss mask, as in `train_sdxl`"
    model_input, target = rand(batch_size, 9, side, side), rand(batch_size, 4, side, side)
    mask = torch.ones(batch_size, 1, side, side, device=DEVICE)
    clip, clip_2 = models['text_encoder'], models['text_encoder_2']
    input_ids = random_tokens(batch_size, 77, clip, generator)
    input_ids_2 = random_tokens(batch_size, 77, clip_2, generator)
    timesteps = torch.full((batch_size,), 500, device=DEVICE)
    time_ids = rand(batch_size, 6)
    def predict():
        output, output_2 = clip(input_ids, output_hidden_states=True), clip_2(input_ids_2, output_hidden_states=True)
        hidden_states = torch.cat([output.hidden_states[-2], output_2.hidden_states[-2]], -1)
        return models['unet'](model_input, timesteps, encoder_hidden_states=hidden_states,
                              added_cond_kwargs={'text_embeds': output_2[0], 'time_ids': time_ids}).sample
    return predict, target, mask

def flux_prediction(models, rand, generator, batch_size, side, t5_length, dtype):
    "A function that predicts, its target and a loss mask, as in `train_flux`"
    h = side//2
    model_input, target = rand(batch_size, h**2, 384), rand(batch_size, h**2, 64)[:, None]
    mask = torch.ones(batch_size, 1, h**2, 1, device=DEVICE)
    clip, t5 = models['text_encoder'], models['text_encoder_2']
    input_ids = random_tokens(batch_size, 77, clip, generator)
    t5_ids = random_tokens(batch_size, t5_length, t5, generator)
    sigmas = torch.full((batch_size,), .5, device=DEVICE, dtype=dtype)
    guidance = torch.full((batch_size,), 30., device=DEVICE)
    img_ids = torch.cartesian_prod(torch.arange(1), torch.arange(h), torch.arange(h)).to(DEVICE, dtype)
    txt_ids = torch.zeros(t5_length, 3, device=DEVICE, dtype=dtype)
    def predict():
        return models['transformer'](
            hidden_states=model_input, timestep=sigmas, guidance=guidance, txt_ids=txt_ids, img_ids=img_ids,
            pooled_projections=clip(input_ids).pooler_output, encoder_hidden_states=t5(t5_ids)[0]).sample[:, None]
    return predict, target, mask

def training_step(model, models, dtype, batch_size, side, t5_length):
    "A function that takes one training step: text encoders, denoiser, masked loss, backward pass, Adafactor"
    generator = torch.Generator().manual_seed(0)
    def rand(*shape): return torch.randn(shape, generator=generator).to(DEVICE, dtype)
    params = [p for net in models.values() for p in net.parameters()]
    optimizer = Adafactor(params, 1e-5, stochastic_rounding=dtype==torch.bfloat16)
    if model=='sdxl': predict, target, mask = sdxl_prediction(models, rand, generator, batch_size, side)
    else: predict, target, mask = flux_prediction(models, rand, generator, batch_size, side, t5_length, dtype)
    def step():
        masked_mse(predict(), target, mask).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return step

MEASURED = ('weights, millions', 'seconds per step', 'TFLOP per step', 'share of peak FLOPS', 'peak_gib')

def measure_step(model, dtype, size, quick, repeats):
    "Duration, operations and memory of a training step"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    models = random_models(model, dtype, quick)
    step = training_step(model, models, dtype, 4, size//8, 16 if quick else 512)
    with FlopCounterMode(display=False) as flops: step()
    if CUDA: torch.cuda.reset_peak_memory_stats()
    duration, peak = median_seconds({'step': step}, repeats)['step'], for_this_gpu(PEAK_FLOPS)
    share = flops.get_total_flops()/duration/peak[dtype_name(dtype)] if peak else 'unmeasured'
    memory = torch.cuda.max_memory_allocated()/2**30 if CUDA else 'unmeasured'
    n_weights = sum(map(count_params, models.values()))
    return dict(zip(MEASURED, (n_weights/1e6, duration, flops.get_total_flops()/1e12, share, memory)))

def full_rows(quick, repeats):
    "Seconds per step, share of the peak and memory of both models, with all that Table 7 trains"
    rows = []
    for model,dtype in (('sdxl', torch.float32), ('flux', torch.bfloat16)):
        size = 64 if quick else 1024
        row = {'model': model, 'dtype': 'TF32' if model=='sdxl' else 'bfloat16', 'size': size, 'batch_size': 4}
        if CUDA or quick: row |= measure_step(model, dtype, size, quick, repeats)
        else: row |= dict.fromkeys(MEASURED, 'unmeasured')
        if CUDA: torch.cuda.empty_cache()
        rows.append(row)
        print(row, flush=True)
    return rows

PARTS = { # Name to function, title, text
    'optimizer': (optimizer_rows, 'Adafactor',
        "One step of elbowsynth's Adafactor and of that of transformers, alternating on the same weights and gradients. The minimum time reads weights and gradients once and writes weights once, at the "
        "card's bandwidth: 6 bytes per weight in bfloat16. Aims: at least twice as fast on a CPU, within four times of that minimum on a GPU."),
    'cached': (cached_rows, 'Cached latents',
        'Training steps of the small models, with latents cached on disk and computed in every step.'),
    'full': (full_rows, 'Real sizes',
        'Both models with random weights and their text encoders, all of it trained, latents cached: 1024 x 1024, batch size 4, T5 at 512 tokens, gradient checkpointing. The share of the peak counts '
        'the operations of the step, recomputation included. Aims: 45 %, and FLUX with T5 and CLIP within a card of 80 GB.')}

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--quick', action='store_true', help='small, one repeat: to see that it runs; writes nothing unless --out is given')
    parser.add_argument('--out', type=Path, help='folder for the tables, bench/results by default')
    parser.add_argument('--repeats', type=int, default=5)
    parser.add_argument('--parts', nargs='*', default=list(PARTS), choices=list(PARTS))
    args = parser.parse_args()
    torch.manual_seed(0)
    settings = {'torch': torch.__version__, 'threads': torch.get_num_threads(), 'repeats': args.repeats, 'quick': args.quick}
    for part in args.parts:
        measure, title, text = PARTS[part]
        rows = measure(args.quick, 1 if args.quick else args.repeats)
        if not CUDA: text += ' There is no GPU here: what needs one is `unmeasured`.'
        if not args.quick or args.out: write_results(f'diffusion-{part}', title, text, rows, settings, out=args.out)

if __name__=='__main__': main()

"""Training loops of the three GANs, a plain reference implementation against ours, on this machine: `python bench/gans.py [--quick]`.

The reference is what one would write first: autograd for the gradient penalty, upsampling and convolution one after the other, the weights of the critic or discriminator
not frozen during the generator's step, Adam with its defaults, images in memory as floats. Both make the same updates in the same precision. Each loop runs in its own process, which
reports its peak memory; the processes take turns, so that a busy machine affects both alike."""
import argparse, contextlib, json, resource, statistics, subprocess, sys, time
from pathlib import Path
import pandas as pd
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from elbowsynth.gans import ac_gan, tac_gan, wgan_gp
from elbowsynth.paper import TABLE3
from elbowsynth.gans.gan import (
    adam, cuda_graphed, label_cross_entropy, LABEL_FIELDS, maybe_compile, one_hot_labels,
    optimizer_step, UpConv)
from elbowsynth.training import configure_device, NanGuard, to_tensor
from results import round_to_4_digits, write_results

FIELD_SIZES = [len(values) for values in LABEL_FIELDS.values()]
PAPER = {'hours': 996, 'hours if 32 are those of the largest WGAN-GP': 320}
MODELS = ['wgan_gp', 'ac_gan', 'tac_gan']
N_IMAGES = 20

def reference_wgan_gp(size, width, batch_size, device):
    "A step of the WGAN-GP as one would write it first"
    gen = wgan_gp.Generator(size, width).to(device)
    critic = wgan_gp.Critic(size, width).to(device)
    opt_g,opt_c = (torch.optim.Adam(net.parameters(), 2e-4, (.5, .9), weight_decay=1e-4) for net in (gen, critic))
    images = torch.rand(N_IMAGES, 1, size, size, device=device)*2-1
    def noise(): return torch.randn(batch_size, 256, device=device)
    def step(indices):
        real = images[indices]
        for _ in range(5):
            loss,_,_ = wgan_gp.critic_loss(critic, real, gen(noise()).detach(), 10.)
            optimizer_step(opt_c, loss)
        optimizer_step(opt_g, wgan_gp.generator_loss(critic, gen(noise())))
    return step

def our_wgan_gp(size, width, batch_size, device):
    "A step of the WGAN-GP as the stage makes it"
    gen = wgan_gp.Generator(size, width).to(device)
    critic = wgan_gp.Critic(size, width).to(device)
    rng = torch.Generator(device)
    guard = NanGuard(device)
    opt_g,opt_c = (adam(net.parameters(), 2e-4, (.5, .9), 1e-4) for net in (gen, critic))
    images = torch.randint(256, (N_IMAGES, size, size), dtype=torch.uint8, device=device)
    def step(indices):
        terms = wgan_gp.wgan_step(gen, critic, opt_g, opt_c, to_tensor(images[indices]), 10., 5, True, rng)
        guard.update(terms['wasserstein'], terms['gradient_penalty'])
        return terms
    return cuda_graphed(step, device, (rng,))

def toy_labels(device):
    rows = [(list(TABLE3)[i%14], 'AP', 'LR'[i%2]) for i in range(N_IMAGES)]
    return one_hot_labels(pd.DataFrame(rows, columns=list(LABEL_FIELDS))).to(device)

def conditional_nets(model, size, width, device):
    nets = [ac_gan.Generator(size, width), ac_gan.Discriminator(size, width)]
    if model=='tac_gan': nets.append(tac_gan.TwinClassifier(size, width))
    return [net.to(device) for net in nets]

def reference_conditional(model, size, width, batch_size, device):
    "A step of the AC-GAN or the TAC-GAN as one would write it first"
    nets = conditional_nets(model, size, width, device)
    gen,dis,*twin = nets
    rates = 5e-4, 2e-4, 2e-4
    opt_g,opt_d,*opt_twin = (torch.optim.Adam(net.parameters(), lr, (.5, .999)) for net,lr in zip(nets, rates))
    images = torch.rand(N_IMAGES, 1, size, size, device=device)*2-1
    y = toy_labels(device)
    def noise(): return torch.randn(batch_size, 256, device=device)
    def step(indices):
        y_fake = ac_gan.sample_labels(y, batch_size)
        fake = gen(noise(), y_fake).detach()
        losses = ac_gan.discriminator_losses(dis, images[indices], y[indices], fake, y_fake, FIELD_SIZES, not twin)
        optimizer_step(opt_d, sum(losses.values()))
        if twin: optimizer_step(opt_twin[0], label_cross_entropy(twin[0](fake), y_fake, FIELD_SIZES))
        y_fake = ac_gan.sample_labels(y, batch_size)
        fake = gen(noise(), y_fake)
        if twin: losses = tac_gan.tac_generator_losses(dis, twin[0], fake, y_fake, FIELD_SIZES)
        else: losses = ac_gan.generator_losses(dis, fake, y_fake, FIELD_SIZES)
        optimizer_step(opt_g, sum(losses.values()))
    return step

def our_conditional(model, size, width, batch_size, device, compile):
    "A step of the AC-GAN or the TAC-GAN as the stage makes it"
    nets = conditional_nets(model, size, width, device)
    opts = [adam(net.parameters(), lr, (.5, .999)) for net,lr in zip(nets, (5e-4, 2e-4, 2e-4))]
    images = torch.randint(256, (N_IMAGES, size, size), dtype=torch.uint8, device=device)
    y = toy_labels(device)
    guard = NanGuard(device)
    if model=='tac_gan': losses = tac_gan.tac_generator_losses, tac_gan.tac_discriminator_losses, tac_gan.twin_losses
    else: losses = ac_gan.generator_losses, ac_gan.discriminator_losses
    losses = [maybe_compile(loss, device, compile) for loss in losses]
    def step(indices):
        terms = ac_gan.conditional_gan_step(nets, opts, losses, to_tensor(images[indices]), y[indices], y, FIELD_SIZES)
        guard.update(*terms.values())
        return terms
    return cuda_graphed(step, device)

def make_step(model, variant, size, width, batch_size, device):
    "The training step of a model; `variant` is reference, elbowsynth or compiled"
    if model=='wgan_gp':
        make = reference_wgan_gp if variant=='reference' else our_wgan_gp
        return make(size, width, batch_size, device)
    if variant=='reference': return reference_conditional(model, size, width, batch_size, device)
    return our_conditional(model, size, width, batch_size, device, variant=='compiled')

def worker(args):
    "In its own process: for each number of steps read, a line of JSON with the seconds of one step (of `n_parallel` models)"
    torch.manual_seed(0)
    device = torch.device(args.device)
    on_cuda = device.type=='cuda'
    if args.variant!='reference': configure_device(device)
    elif on_cuda: torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True     # the same precision
    UpConv.fused = args.variant!='reference'
    steps = [make_step(args.worker, args.variant, args.size, args.width, args.batch_size, device) for _ in range(args.n_parallel)]
    streams = [torch.cuda.Stream(device) if args.n_parallel>1 else None for _ in steps]
    order = torch.arange(N_IMAGES, device=device)
    n = 0
    for line in sys.stdin:
        n_steps = int(line)
        if on_cuda: torch.cuda.synchronize(device)
        start,start_cpu = time.perf_counter(), time.process_time()
        for _ in range(n_steps):
            if on_cuda: indices = order.roll(n)[:args.batch_size]
            else: indices = order[[(n*args.batch_size+i)%N_IMAGES for i in range(args.batch_size)]]
            n += 1
            for step,stream in zip(steps, streams):
                with torch.cuda.stream(stream) if stream else contextlib.nullcontext(): step(indices)
        if on_cuda: torch.cuda.synchronize(device)
        seconds,cpu = time.perf_counter()-start, time.process_time()-start_cpu
        if on_cuda: peak = torch.cuda.max_memory_allocated(device)
        else: peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss*1024
        print(json.dumps({'seconds': seconds/n_steps, 'cpu': cpu/n_steps, 'peak': peak}), flush=True)

def start_worker(model, variant, n_parallel, args):
    options = {'worker': model, 'variant': variant, 'n-parallel': n_parallel, 'size': args.size, 'width': args.width,
               'batch-size': args.batch_size, 'device': args.device}
    command = [sys.executable, __file__]
    for name,value in options.items(): command += [f'--{name}', str(value)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

def measure(model, variants, n_steps, args):
    "Milliseconds of a step and peak memory of each (variant, n_parallel), measured in turns"
    workers = {key: start_worker(model, *key, args) for key in variants}
    ms,cpu_ms = {key: [] for key in variants}, {key: [] for key in variants}
    peak = {}
    def run(key, n):
        worker = workers[key]
        worker.stdin.write(f'{n}\n')
        worker.stdin.flush()
        return json.loads(worker.stdout.readline())
    try:
        for key in variants: run(key, 4 if args.device=='cuda' else 1)      # warm up, and on CUDA record the graph
        for _ in range(args.repeats):
            for key in variants:
                measured = run(key, n_steps)
                ms[key].append(1e3*measured['seconds'])
                cpu_ms[key].append(1e3*measured['cpu'])
                peak[key] = measured['peak']/2**20
    finally:
        for worker in workers.values():
            worker.stdin.close()
            worker.wait()
    return [{'model': model, 'variant': variant, 'n_parallel': n_parallel, 'ms': statistics.median(ms[variant, n_parallel]),
             'fastest_ms': min(ms[variant, n_parallel]), 'slowest_ms': max(ms[variant, n_parallel]),
             'cpu_ms': statistics.median(cpu_ms[variant, n_parallel]), 'peak_mib': peak[variant, n_parallel]}
            for variant,n_parallel in variants]

def add_speedups(rows, batch_size):
    "Add images per second and speedups over the reference, the first row; returns the rows"
    reference = rows[0]
    columns = ('model', 'variant', 'n_parallel', 'ms', 'fastest_ms', 'slowest_ms', 'cpu_ms')
    return [{column: row[column] for column in columns} | {
                'images_per_second': 1e3*row['n_parallel']*batch_size/row['ms'], 'peak_mib': row['peak_mib'],
                'speedup': reference['ms']*row['n_parallel']/row['ms'],
                'speedup_fastest': reference['fastest_ms']*row['n_parallel']/row['fastest_ms'],
                'speedup_cpu': reference['cpu_ms']*row['n_parallel']/row['cpu_ms']} for row in rows]

def projected_hours(rows, batch_size):
    "Hours of all GAN trainings, from the measured steps: pairs of Table 3, 4000 epochs, a new batch per generator step"
    n_steps = 4000*sum(n_train for n_train,_ in TABLE3.values())/batch_size
    hours = {}
    for model in MODELS:
        ours = [row['ms']/row['n_parallel'] for row in rows if row['model']==model and row['variant']!='reference']
        hours[model] = min(ours)*n_steps/3.6e6
    return hours | {'all': sum(hours.values())}

def parse_args():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--quick', action='store_true', help='small networks, one repeat: a test run; writes nothing unless --out is given')
    parser.add_argument('--out', type=Path, help='folder for the tables, bench/results by default')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--repeats', type=int, default=5)
    parser.add_argument('--models', nargs='*', default=MODELS, choices=MODELS)
    hidden = dict(help=argparse.SUPPRESS)
    parser.add_argument('--worker', default='', **hidden)
    parser.add_argument('--variant', default='', **hidden)
    parser.add_argument('--size', type=int, default=256, **hidden)
    parser.add_argument('--width', type=float, default=1., **hidden)
    parser.add_argument('--batch-size', type=int, default=5, **hidden)
    parser.add_argument('--n-parallel', type=int, default=1, **hidden)
    return parser.parse_args()

def main():
    args = parse_args()
    if args.worker: return worker(args)
    if args.quick: args.size, args.width, args.repeats = 32, 1/8, 1
    on_cuda = args.device=='cuda'
    rows = []
    for model in args.models:
        is_wgan = model=='wgan_gp'
        variants = [('reference', 1), ('elbowsynth', 1)]
        if on_cuda: variants.append(('elbowsynth', 4) if is_wgan else ('compiled', 1))
        if args.quick: n_steps = 1
        elif on_cuda: n_steps = 20 if is_wgan else 200
        else: n_steps = 1 if is_wgan else 5
        measured = add_speedups(measure(model, variants, n_steps, args), args.batch_size)
        for row in measured: print(round_to_4_digits(row), flush=True)
        rows += measured
    settings = {'torch': torch.__version__, 'threads': torch.get_num_threads(), 'size': args.size, 'width': args.width,
                'batch_size': args.batch_size, 'precision': 'TF32' if on_cuda else 'float32', 'repeats': args.repeats, 'paper': PAPER}
    if on_cuda and len(args.models)==3: settings['projected'] = projected_hours(rows, args.batch_size)
    if args.quick and not args.out: return
    table = [{'model': row['model'], 'variant': row['variant'], 'models in parallel': row['n_parallel'],
              'ms per step (fastest to slowest)': '{ms:g} ({fastest_ms:g} to {slowest_ms:g})'.format(**round_to_4_digits(row)),
              'images per second': row['images_per_second'], 'peak memory, MiB': row['peak_mib'], 'speedup': row['speedup'],
              'speedup, fastest turns': row['speedup_fastest'], 'speedup, processor time': row['speedup_cpu']} for row in rows]
    write_results('gans', 'GANs', describe(settings), table, settings, rows, args.out)

def describe(settings):
    "How it was measured, and the projected hours"
    text = ('torch {torch}, {precision}, images of {size} pixels, width {width:g}, batches of {batch_size}. Medians of {repeats} turns, '
            'reference and elbowsynth in turns in one run. ').format(**settings)
    text += 'A step of the WGAN-GP is one batch: five updates of the critic and one of the generator (batch_reuse per_generator_step). '
    if 'projected' not in settings:
        return text+'Nothing here was measured on a GPU: CUDA graphs, several WGAN-GPs in parallel and the hours of all GAN trainings are unmeasured.'
    hours = ', '.join(f'{name} {value:.3g} h' for name,value in settings['projected'].items())
    return text+('All GAN trainings, projected from these steps (28 WGAN-GPs by the counts of Table 3, AC-GAN, TAC-GAN, 4000 epochs): '
                 f'{hours}. The paper: 996 GPU-hours as printed, on L40s; about 320 if its 32 hours are those of the largest WGAN-GP.')

if __name__=='__main__': main()

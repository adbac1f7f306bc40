"""The three GANs, the plain eager loop against ours, on this machine: `python bench/gans.py [--quick]`.

Plain is what one would write first: autograd for the gradient penalty, doubling and convolution one after the other, the critic's or discriminator's weights
not frozen while the generator learns, Adam as it comes; films lie in memory as floats. Both do the same updates in the same precision. Each loop runs in a process of its own, which
says how much memory it took; the processes take turns, so that a busy machine disturbs both alike."""
import argparse, contextlib, json, resource, statistics, subprocess, sys, time
from pathlib import Path
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from elbowsynth.gans import ac_gan, tac_gan, wgan_gp
from elbowsynth.paper import TABLE3
from elbowsynth.gans.gan import (
    adam, cuda_graphed, label_cross_entropy, LABEL_FIELDS, maybe_compile, one_hot_labels,
    optimizer_step, UpConv)
from elbowsynth.training import configure_device, NanGuard, to_tensor
from results import digits, keep

SIZES = [len(words) for words in LABEL_FIELDS.values()]
PAPER = {'hours': 996, 'hours if 32 are those of the largest WGAN-GP': 320}

def plain_wgan_gp(size, width, batch, device):
    gen, critic = wgan_gp.Generator(size, width).to(device), wgan_gp.Critic(size, width).to(device)
    opt_g, opt_c = (torch.optim.Adam(m.parameters(), 2e-4, (.5, .9), weight_decay=1e-4) for m in (gen, critic))
    films = torch.rand(20, 1, size, size, device=device)*2-1
    def turn(at):
        real = films[at]
        for _ in range(5): optimizer_step(opt_c, wgan_gp.critic_loss(critic, real, gen(torch.randn(batch, 256, device=device)).detach(), 10.)[0])
        optimizer_step(opt_g, wgan_gp.generator_loss(critic, gen(torch.randn(batch, 256, device=device))))
    return turn

def our_wgan_gp(size, width, batch, device, fuse=False):
    gen, critic, rng, guard = wgan_gp.Generator(size, width).to(device), wgan_gp.Critic(size, width).to(device), torch.Generator(device), NanGuard(device)
    opt_g, opt_c = (adam(m.parameters(), 2e-4, (.5, .9), 1e-4) for m in (gen, critic))
    films = torch.randint(256, (20, size, size), dtype=torch.uint8, device=device)
    def turn(at):
        terms = wgan_gp.wgan_step(gen, critic, opt_g, opt_c, to_tensor(films[at]), 10., 5, True, rng)
        guard.update(terms['wasserstein'], terms['penalty'])
        return terms
    return cuda_graphed(turn, device, (rng,))

def labels(n, device):
    import pandas as pd
    return one_hot_labels(pd.DataFrame([(list(TABLE3)[i%14], 'AP', 'LR'[i%2]) for i in range(n)], columns=list(LABEL_FIELDS))).to(device)

def plain_labelled(size, width, batch, device, twin):
    nets = [ac_gan.Generator(size, width).to(device), ac_gan.Discriminator(size, width).to(device)]+[tac_gan.TwinClassifier(size, width).to(device)]*twin
    gen, dis, *twins = nets
    opt_g, opt_d, *opt_c = (torch.optim.Adam(m.parameters(), lr, (.5, .999)) for m,lr in zip(nets, (5e-4, 2e-4, 2e-4)))
    films, y = torch.rand(20, 1, size, size, device=device)*2-1, labels(20, device)
    def turn(at):
        x, y_fake = films[at], ac_gan.sample_labels(y, batch)
        fake = gen(torch.randn(batch, 256, device=device), y_fake).detach()
        optimizer_step(opt_d, sum(ac_gan.discriminator_losses(dis, x, y[at], fake, y_fake, SIZES, not twin).values()))
        if twin: optimizer_step(opt_c[0], label_cross_entropy(twins[0](fake), y_fake, SIZES))
        y_fake = ac_gan.sample_labels(y, batch)
        fake = gen(torch.randn(batch, 256, device=device), y_fake)
        optimizer_step(opt_g, sum((tac_gan.tac_generator_losses(dis, twins[0], fake, y_fake, SIZES) if twin else ac_gan.generator_losses(dis, fake, y_fake, SIZES)).values()))
    return turn

def our_labelled(size, width, batch, device, twin, fuse=False):
    nets = [ac_gan.Generator(size, width).to(device), ac_gan.Discriminator(size, width).to(device)]+[tac_gan.TwinClassifier(size, width).to(device)]*twin
    opts = [adam(m.parameters(), lr, (.5, .999)) for m,lr in zip(nets, (5e-4, 2e-4, 2e-4))]
    films, y, guard = torch.randint(256, (20, size, size), dtype=torch.uint8, device=device), labels(20, device), NanGuard(device)
    step, losses = ((tac_gan.tac_gan_step, (ac_gan.discriminator_losses, label_cross_entropy, tac_gan.tac_generator_losses)) if twin else
                    (ac_gan.ac_gan_step, (ac_gan.discriminator_losses, ac_gan.generator_losses)))
    losses = [maybe_compile(f, device, fuse) for f in losses]
    def turn(at):
        terms = step(*nets, *opts, to_tensor(films[at]), y[at], y, SIZES, *losses)
        guard.update(*terms.values())
        return terms
    return cuda_graphed(turn, device)

LOOPS = {'wgan_gp': (plain_wgan_gp, our_wgan_gp), 'ac_gan': (lambda *a: plain_labelled(*a, False), lambda *a, **k: our_labelled(*a, False, **k)),
         'tac_gan': (lambda *a: plain_labelled(*a, True), lambda *a, **k: our_labelled(*a, True, **k))}

def worker(model, way, size, width, batch, device, at_once):
    "In a process of its own: a line of JSON for each line read, with the seconds of one step (of `at_once` models)"
    torch.manual_seed(0)
    device = torch.device(device)
    if way!='plain': configure_device(device)
    elif device.type=='cuda': torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True   # the same precision
    UpConv.folded = way!='plain'
    make = LOOPS[model][way!='plain']
    turns = [make(size, width, batch, device, **({'fuse': True} if way=='fused' else {})) for _ in range(at_once)]
    streams = [torch.cuda.Stream(device) if at_once>1 else None for _ in turns]
    order, n = torch.arange(20, device=device), 0
    sync = (lambda: torch.cuda.synchronize(device)) if device.type=='cuda' else (lambda: None)
    for line in sys.stdin:
        steps = int(line)
        sync(); start, start_cpu = time.perf_counter(), time.process_time()
        for _ in range(steps):
            at, n = order[[(n*batch+i)%20 for i in range(batch)]] if device.type=='cpu' else order.roll(n)[:batch], n+1
            for turn,stream in zip(turns, streams):
                with torch.cuda.stream(stream) if stream else contextlib.nullcontext(): turn(at)
        sync()
        peak = torch.cuda.max_memory_allocated(device) if device.type=='cuda' else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss*1024
        print(json.dumps({'seconds': (time.perf_counter()-start)/steps, 'cpu': (time.process_time()-start_cpu)/steps, 'peak': peak}), flush=True)

def measure(model, ways, repeats, steps, args):
    "Milliseconds of a step and peak memory of each way, in turns"
    start = lambda way, k: subprocess.Popen([sys.executable, __file__, '--worker', model, '--way', way, '--size', str(args.size), '--width', str(args.width), '--batch', str(args.batch),
                                             '--device', args.device, '--at-once', str(k)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    workers, seen, cpu, peak = {(w, k): start(w, k) for w,k in ways}, {}, {}, {}
    def ask(key, n):
        p = workers[key]
        p.stdin.write(f'{n}\n'); p.stdin.flush()
        return json.loads(p.stdout.readline())
    try:
        for key in workers: ask(key, 4 if args.device=='cuda' else 1)                       # warm up, and on CUDA record the graph
        for _ in range(repeats):
            for key in workers:
                said = ask(key, steps)
                seen.setdefault(key, []).append(1e3*said['seconds'])
                cpu.setdefault(key, []).append(1e3*said['cpu'])
                peak[key] = said['peak']
    finally:
        for p in workers.values(): p.stdin.close(); p.wait()
    return {key: {'ms': statistics.median(v), 'all_ms': v, 'cpu_ms': statistics.median(cpu[key]), 'peak_mib': peak[key]/2**20} for key,v in seen.items()}

def projected(rows, batch, at_once):
    "Hours of the whole arm by measured steps: pairs of Table 3, 4000 epochs, meaning B"
    steps = 4000*sum(train for train,_ in TABLE3.values())/batch
    ms = {m: min(r['ms']/r['models'] for r in rows if r['model']==m and r['way']!='plain') for m in LOOPS}
    return {m: v*steps/3.6e6 for m,v in ms.items()} | {'all': sum(ms.values())*steps/3.6e6}

def main():
    a = argparse.ArgumentParser(description=__doc__)
    a.add_argument('--quick', action='store_true', help='small networks, one repeat: to see that it runs; writes nothing unless --out is given')
    a.add_argument('--out', type=Path, help='folder for the tables, bench/results by default')
    a.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    a.add_argument('--repeats', type=int, default=5)
    a.add_argument('--models', nargs='*', default=list(LOOPS), choices=list(LOOPS))
    for name,default in (('--worker', ''), ('--way', '')): a.add_argument(name, default=default, help=argparse.SUPPRESS)
    for name,default in (('--size', 256), ('--batch', 5), ('--at-once', 1)): a.add_argument(name, type=int, default=default, help=argparse.SUPPRESS)
    a.add_argument('--width', type=float, default=1., help=argparse.SUPPRESS)
    args = a.parse_args()
    if args.worker: return worker(args.worker, args.way, args.size, args.width, args.batch, args.device, args.at_once)
    if args.quick: args.size, args.width, args.repeats = 32, 1/8, 1
    cuda = args.device=='cuda'
    rows = []
    for model in args.models:
        ways = [('plain', 1), ('ours', 1)]+([('ours', 4)] if model=='wgan_gp' else [('fused', 1)])*cuda
        steps = 1 if args.quick else 200 if cuda and model!='wgan_gp' else 20 if cuda else 1 if model=='wgan_gp' else 5
        found = measure(model, ways, args.repeats, steps, args)
        for (way, k), r in found.items():
            rows.append({'model': model, 'way': way, 'models': k, 'ms': r['ms'], 'fastest_ms': min(r['all_ms']), 'slowest_ms': max(r['all_ms']), 'cpu_ms': r['cpu_ms'],
                         'images_per_second': 1e3*k*args.batch/r['ms'], 'peak_mib': r['peak_mib'], 'times_plain': found['plain', 1]['ms']*k/r['ms'],
                         'times_plain_fastest': min(found['plain', 1]['all_ms'])*k/min(r['all_ms']), 'times_plain_cpu': found['plain', 1]['cpu_ms']*k/r['cpu_ms']})
            print(digits(rows[-1]), flush=True)
    about = {'torch': torch.__version__, 'threads': torch.get_num_threads(), 'size': args.size, 'width': args.width, 'batch': args.batch,
             'precision': 'TF32' if cuda else 'float32', 'repeats': args.repeats, 'paper': PAPER}
    if cuda and len(args.models)==3: about['projected'] = projected(rows, args.batch, 4)
    if args.quick and not args.out: return
    shown = [{'model': r['model'], 'loop': r['way'], 'models at a time': r['models'], 'ms a step (fastest to slowest)': '{ms:g} ({fastest_ms:g} to {slowest_ms:g})'.format(**digits(r)),
              'images a second': r['images_per_second'], 'peak memory, MiB': r['peak_mib'], 'times plain': r['times_plain'], 'times plain, fastest turns': r['times_plain_fastest'],
              'times plain, processor time': r['times_plain_cpu']} for r in rows]
    keep('gans', 'GANs', words(about), shown, about, rows, args.out)

def words(about):
    "How it was measured, and what it comes to"
    text = (f'torch {about["torch"]}, {about["precision"]}, films of side {about["size"]}, width {about["width"]:g}, batches of {about["batch"]}. '
            f'Medians of {about["repeats"]} turns, plain and ours by turns in one run. A step of the WGAN-GP is a minibatch in meaning B: five updates of the critic and one of the generator. ')
    if 'projected' in about: return text+('Whole arm, projected from these steps (28 WGAN-GPs by the counts of Table 3, AC-GAN, TAC-GAN, 4000 epochs, meaning B): '
        +', '.join(f'{k} {v:.3g} h' for k,v in about['projected'].items())+'. The paper: 996 GPU-hours as printed, on L40s; about 320 if its 32 hours are those of the largest WGAN-GP.')
    return text+'Nothing here was measured on a GPU: CUDA graphs, several WGAN-GPs at a time and the hours of the whole arm are unmeasured.'

if __name__=='__main__': main()

"The three GANs: the way they are trained against the plain way, resumption after kill -9, broken numbers, and the rules of who learns from what"
import copy, json, os, signal, subprocess, sys, time
from pathlib import Path
import numpy as np, pandas as pd
import pytest, torch
from torch import nn
from safetensors.torch import load_file
from conftest import ROOT
from elbowsynth.gans import ac_gan, gan, tac_gan, wgan_gp
from elbowsynth.gans.gan import (
    adam, label_cross_entropy, LABEL_FIELDS, one_hot_labels, optimizer_step, sample_checkpoint,
    UpConv)
from elbowsynth.training import (
    batch_indices, load_checkpoint, previous_checkpoint, TrainingDiverged)

SIZES = [14, 2, 2]
PAIRS = pd.DataFrame([(f'f{i}__x', f'p{i}', ['normal', 'joint effusion', 'supracondylar fracture'][i%3], ['AP', 'LAT'][i%2], 'LR'[i//2%2]) for i in range(12)],
                     columns=['pair', 'patient', 'pathology', 'view', 'side'])
FILMS = np.random.default_rng(0).integers(256, size=(len(PAIRS), 32, 32), dtype=np.uint8)
SMALL = dict(width=1/16, device='cpu', log_every=5)
TRAIN = {'wgan_gp': (wgan_gp.train_wgan_gp, {'n_critic': 2, 'max_models': 2}), 'ac_gan': (ac_gan.train_ac_gan, {}), 'tac_gan': (tac_gan.train_tac_gan, {})}

@pytest.fixture(autouse=True)
def one_thread():
    "Small tensors are slow on many threads, and a sum has one order on one"
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)

@pytest.fixture
def unfolded(monkeypatch): monkeypatch.setattr(UpConv, 'folded', False)

def close(a, b, eps):
    "Largest difference, relative to the largest number of each tensor"
    for x,y in zip(a, b, strict=True): assert (x-y).abs().max()<=eps*max(y.abs().max(), 1e-12), ((x-y).abs().max(), y.abs().max())

# The networks

def test_counts_with_biases_that_batch_normalisation_would_undo():
    "As other code counts: a bias for every layer (gans.md, section 1)"
    with torch.device('meta'): nets = wgan_gp.Generator(), wgan_gp.Critic(), ac_gan.Generator(), ac_gan.Discriminator(), tac_gan.TwinClassifier()
    count = lambda net: sum(p.numel() for p in net.parameters())
    spared = lambda net: sum(m.weight.shape[0] for m in net.modules() if isinstance(m, (nn.Linear, nn.Conv2d)) and m.bias is None)
    assert [count(m) for m in nets]==[35_123_425, 10_890_241, 1_516_477, 137_679, 135_630]
    assert [count(m)+spared(m) for m in nets]==[35_254_977, 10_890_241, 1_520_825, 137_931, 135_882]

def test_the_other_reading_of_table_5_has_other_counts():
    "Its five convolutions as printed need a stride of 4 to come from side 32 to side 8; ours has the sixth in between (gans.md, section 1.2)"
    maps_ = [1, 4, 8, 16, 64, 128]
    for bias,total in ((False, 123_791), (True, 124_011)):
        rows = [nn.Sequential(nn.Conv2d(a, b, 3, 4 if b==64 else 2, 1, bias=bias), nn.BatchNorm2d(b)) for a,b in zip(maps_, maps_[1:])]
        assert [tuple(s) for s in gan.block_shapes(nn.Sequential(*rows), torch.zeros(2, 1, 256, 256))]==[(4, 128, 128), (8, 64, 64), (16, 32, 32), (64, 8, 8), (128, 4, 4)]
        assert sum(p.numel() for r in rows for p in r.parameters())+2048*(1+18)+1+18==total

def test_last_row_does_not_double():
    for net,z in ((wgan_gp.Generator(32, 1/16), torch.randn(2, 256)), (ac_gan.Generator(32, 1/16), torch.randn(2, 274))):
        shapes = gan.block_shapes(net, z)
        assert shapes[-2][1:]==shapes[-1][1:]==(32, 32) and shapes[-1][0]==1 and not any(isinstance(m, UpConv) for m in net[-1].modules())

@pytest.mark.parametrize('make', [lambda: wgan_gp.Generator(64, 1/8), lambda: ac_gan.Generator(64, 1/2)])
def test_folded_generator_is_the_tables_generator(make, monkeypatch):
    torch.manual_seed(0)
    net, z, got = make().double(), torch.randn(5, 256 if make().forward.__func__ is nn.Sequential.forward else 274, dtype=torch.double), []
    args = (z,) if z.shape[1]==256 else (z[:, :256], z[:, 256:])
    for folded in (True, False):
        monkeypatch.setattr(UpConv, 'folded', folded)
        twin = copy.deepcopy(net)
        twin(*args).square().sum().backward()
        got.append([twin(*args).detach(), *(p.grad for p in twin.parameters()), *(b for b in twin.buffers())])
    close(*[[t.double() for t in g] for g in got], 1e-10)

# The gradient penalty

def wgan_net(critic, masks):
    "The critic with known masks, as a function; masks of 0 and 1"
    def net(x):
        for (conv,act,drop),m in zip(list(critic)[:-1], masks): x = nn.functional.elu(conv(x), .2)*m/(1-drop.p)
        return critic[-1](x)
    return net

def plain_critic_loss(critic, real, fake, lam, eps, masks):
    "By autograd, in three passes"
    n = len(real)
    parts = [[m[i*n:(i+1)*n] for m in masks] for i in range(3)]
    x = (eps*real+(1-eps)*fake).requires_grad_()
    g, = torch.autograd.grad(wgan_net(critic, parts[2])(x).sum(), x, create_graph=True)
    apart, penalty = wgan_net(critic, parts[0])(real).mean()-wgan_net(critic, parts[1])(fake).mean(), ((g.flatten(1).norm(2, dim=1)-1)**2).mean()
    return lam*penalty-apart, apart, penalty

@pytest.mark.parametrize('dtype,eps_loss,eps_grad', [(torch.double, 1e-12, 1e-11), (torch.float, 1e-5, 1e-5)])
def test_written_out_penalty_is_that_of_autograd(dtype, eps_loss, eps_grad):
    torch.manual_seed(0)
    critic, (real, fake) = wgan_gp.Critic(64, 1/4).to(dtype), torch.rand(2, 5, 1, 64, 64, dtype=dtype)*2-1
    masks, eps = wgan_gp.critic_forward(critic, torch.cat([real, fake, fake]))[2], torch.rand(5, 1, 1, 1, dtype=dtype)
    ours = wgan_gp.critic_gradients(critic, real, fake, 10., eps=eps, masks=masks)
    ours_grad = [p.grad.clone() for p in critic.parameters()]
    critic.zero_grad()
    loss, apart, penalty = plain_critic_loss(critic, real, fake, 10., eps, masks)
    loss.backward()
    close([ours['wasserstein'], ours['penalty']], [apart.detach(), penalty.detach()], eps_loss)
    close(ours_grad[:-1], [p.grad for p in critic.parameters()][:-1], eps_grad)
    assert ours_grad[-1]==0 and critic[-1][1].bias.grad.abs()<1e-6          # a constant in the scores is of no account

def test_third_opinion_on_the_penalty():
    "torch.func.grad, film by film"
    torch.manual_seed(1)
    critic, x = wgan_gp.Critic(32, 1/8).double(), torch.rand(5, 1, 32, 32, dtype=torch.double)
    masks = wgan_gp.critic_forward(critic, torch.cat([x, x, x]))[2]
    slopes = torch.stack([torch.func.grad(lambda f: wgan_net(critic, [m[10+i:11+i] for m in masks])(f[None]).sum())(x[i]) for i in range(5)])
    ours = wgan_gp.critic_gradients(critic, x, x, 10., eps=torch.ones(5, 1, 1, 1), masks=masks)
    close([ours['penalty'], ours['slope_max']], [((slopes.flatten(1).norm(dim=1)-1)**2).mean().detach(), slopes.flatten(1).norm(dim=1).max().detach()], 1e-12)

def test_penalty_is_of_single_films():
    "The order of films is of no account, and a film's slope does not depend on its neighbours"
    torch.manual_seed(2)
    critic, x = wgan_gp.Critic(32, 1/8, dropout=0).double(), torch.rand(5, 1, 32, 32, dtype=torch.double)
    value = lambda o: wgan_gp.critic_gradients(critic, o, o, 10., eps=torch.ones(len(o), 1, 1, 1))['penalty']
    assert abs(value(x)-value(x.flip(0)))<1e-14 and abs(value(x)-torch.stack([value(x[i:i+1]) for i in range(5)]).mean())<1e-14

# Our steps and the plain ones

def plain_wgan_turn(gen, critic, opt_g, opt_c, real, rng):
    "The same random numbers, everything by autograd, nothing frozen"
    n, sides = len(real), [real.shape[-1]>>i for i in range(1, 6)]
    noise = lambda: torch.randn(n, 256, dtype=real.dtype, generator=rng)
    masks = lambda k: [wgan_gp.dropout_mask((k, row[0].out_channels, s, s), .25, 'cpu', real.dtype, rng) for row,s in zip(list(critic)[:-1], sides)]
    for _ in range(5):
        fake, eps = gen(noise()).detach(), torch.rand(n, 1, 1, 1, generator=rng)
        optimizer_step(opt_c, plain_critic_loss(critic, real, fake, 10., eps, masks(3*n))[0])
    fake = gen(noise())
    optimizer_step(opt_g, -wgan_net(critic, masks(n))(fake).mean())

def plain_labelled_turn(nets, opts, x, y, table):
    noise, y_fake = (lambda: torch.randn(len(x), 256, dtype=x.dtype)), ac_gan.sample_labels(table, len(x))
    fake = nets[0](noise(), y_fake).detach()
    optimizer_step(opts[1], sum(ac_gan.discriminator_losses(nets[1], x, y, fake, y_fake, SIZES, len(nets)==2).values()))
    if len(nets)==3: optimizer_step(opts[2], label_cross_entropy(nets[2](fake), y_fake, SIZES))
    y_fake = ac_gan.sample_labels(table, len(x))
    fake = nets[0](noise(), y_fake)
    optimizer_step(opts[0], sum((tac_gan.tac_generator_losses(*nets[1:], fake, y_fake, SIZES) if len(nets)==3 else ac_gan.generator_losses(nets[1], fake, y_fake, SIZES)).values()))

def weights_after(model, ours, steps, dtype, monkeypatch):
    "State and gradients after some steps, ours or plain, from the same start and with the same random numbers"
    monkeypatch.setattr(UpConv, 'folded', ours)
    torch.manual_seed(0)
    make = adam if ours else lambda p, lr, betas, weight_decay=0.: torch.optim.Adam(p, lr, betas, weight_decay=weight_decay, foreach=False)
    if model=='wgan_gp':
        nets, rng = [wgan_gp.Generator(32, 1/8).to(dtype), wgan_gp.Critic(32, 1/8).to(dtype)], torch.Generator().manual_seed(5)
        opts = [make(m.parameters(), 2e-4, (.5, .9), 1e-4) for m in nets]
        turn = lambda x, y: wgan_gp.wgan_step(*nets, *opts, x, 10., 5, True, rng) if ours else plain_wgan_turn(*nets, *opts, x, rng)
    else:
        nets = [ac_gan.Generator(32, 1/4).to(dtype), ac_gan.Discriminator(32, 1/4).to(dtype)]+[tac_gan.TwinClassifier(32, 1/4).to(dtype)]*(model=='tac_gan')
        opts = [make(m.parameters(), 5e-4, (.5, .999)) for m in nets]
        table = one_hot_labels(PAIRS).to(dtype)
        step = ac_gan.ac_gan_step if model=='ac_gan' else tac_gan.tac_gan_step
        turn = lambda x, y: step(*nets, *opts, x, y, table, SIZES) if ours else plain_labelled_turn(nets, opts, x, y, table)
    y = one_hot_labels(PAIRS).to(dtype)
    for at in list(batch_indices(len(FILMS), 5, 100))[:steps]: turn((torch.from_numpy(FILMS[at])[:, None]/127.5-1).to(dtype), y[at])
    return [t.double() for m in nets for t in m.state_dict().values()], [p.grad.double() for p in nets[0].parameters()]

@pytest.mark.parametrize('model', list(TRAIN))
def test_twenty_steps_in_double_precision(model, monkeypatch):
    (ours, _), (plain, _) = (weights_after(model, o, 20, torch.double, monkeypatch) for o in (True, False))
    for a,b in zip(ours, plain, strict=True): assert (a-b).abs().max()<1e-9

@pytest.mark.parametrize('model', list(TRAIN))
def test_one_step_in_single_precision(model, monkeypatch):
    "The generator's gradient, after the critic or discriminator has moved; relative to its largest number"
    (_, ours), (_, plain) = (weights_after(model, o, 1, torch.float, monkeypatch) for o in (True, False))
    whole = torch.cat([g.flatten() for g in plain])
    assert (torch.cat([g.flatten() for g in ours])-whole).norm()<=1e-5*whole.norm()

def test_head_in_an_adam_of_its_own_is_the_same():
    "Bit for bit: so Table 5's classifier optimizer says nothing as long as the rates are equal"
    got = []
    for apart in (False, True):
        torch.manual_seed(0)
        dis = ac_gan.Discriminator(32, 1/4)
        body, head = [*dis.trunk.parameters(), *dis.score.parameters()], list(dis.kind.parameters())
        opts = [adam(body, 2e-4, (.5, .999)), adam(head, 2e-4, (.5, .999))] if apart else [adam([{'params': body}, {'params': head, 'lr': 2e-4}], 2e-4, (.5, .999))]
        for _ in range(20):
            for o in opts: o.zero_grad()
            score, kind = dis(torch.randn(5, 1, 32, 32))
            (score.square().mean()+kind.square().mean()).backward()
            for o in opts: o.step()
        got.append(list(dis.state_dict().values()))
    assert all(torch.equal(a, b) for a,b in zip(*got))

def test_losses_can_be_compiled():
    "Into one graph, first and second network alike; the values stay"
    torch.manual_seed(0)
    dis, x, y = ac_gan.Discriminator(32, 1/16).eval(), torch.randn(4, 1, 32, 32), one_hot_labels(PAIRS)[:4]
    plain = ac_gan.discriminator_losses(dis, x, y, -x, y, SIZES)
    fused = torch.compile(ac_gan.discriminator_losses, backend='aot_eager', fullgraph=True)(dis, x, y, -x, y, SIZES)
    close([v.detach() for v in fused.values()], [v.detach() for v in plain.values()], 1e-6)

@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
@pytest.mark.parametrize('model', list(TRAIN))
def test_graphs_on_a_gpu_do_what_eager_does(model, tmp_path, monkeypatch):
    train, more = TRAIN[model]
    for name in ('graph', 'eager'):
        if name=='eager': monkeypatch.setattr(sys.modules[train.__module__], 'whole', lambda turn, device, generators=(): turn)
        train(FILMS, PAIRS, PAIRS, tmp_path/name, epochs=4, every=4, **SMALL | {'device': 'cuda'}, **more)
    files = sorted(tmp_path.glob('graph/**/checkpoint.safetensors'))
    for f in files:
        a, b = load_file(f), load_file(tmp_path/'eager'/f.relative_to(tmp_path/'graph'))
        assert all(torch.allclose(a[k].float(), b[k].float(), atol=1e-3) for k in a if k.startswith(('gen/', 'critic/', 'dis/')))

# Who learns from what

def test_nobody_else_moves():
    torch.manual_seed(0)
    nets = [ac_gan.Generator(32, 1/16), ac_gan.Discriminator(32, 1/16), tac_gan.TwinClassifier(32, 1/16)]
    gen, dis, twin = nets
    y, x = one_hot_labels(PAIRS)[:5], torch.randn(5, 1, 32, 32)
    moved = []
    class Watch:
        "Stands in for an optimizer: notes who has a gradient when it steps"
        def zero_grad(self): [setattr(p, 'grad', None) for m in nets for p in m.parameters()]
        def step(self): moved.append([any(p.grad is not None for p in m.parameters()) for m in nets])
    buffers = [b.clone() for b in dis.buffers()]
    tac_gan.tac_gan_step(*nets, Watch(), Watch(), Watch(), x, y, y, SIZES)
    assert moved==[[False, True, False], [False, False, True], [True, False, False]]       # D, then C, then G
    assert all(p.requires_grad for m in nets for p in m.parameters())
    norms = [m for m in dis.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms[0].num_batches_tracked==3 and not any(torch.equal(a, b) for a,b in zip(buffers, dis.buffers()))   # real, fake, and G's step: in training mode

def test_generator_of_the_wgan_leaves_the_critic_alone():
    torch.manual_seed(0)
    gen, critic = wgan_gp.Generator(32, 1/16), wgan_gp.Critic(32, 1/16)
    push = wgan_gp.generator_output_grad(critic, gen(torch.randn(5, 256)).detach())
    assert all(p.grad is None for m in (gen, critic) for p in m.parameters()) and push.abs().sum()>0

def test_twin_cannot_be_the_discriminators_head():
    "With the head in place of the twin both class terms cancel, which a gradient sees"
    torch.manual_seed(0)
    dis, twin, y = ac_gan.Discriminator(32, 1/16).eval(), tac_gan.TwinClassifier(32, 1/16).eval(), one_hot_labels(PAIRS)[:5]
    def pull(second):
        x = torch.full((5, 1, 32, 32), .1, requires_grad=True)
        terms = tac_gan.tac_generator_losses(dis, second, x, y, SIZES)
        return torch.autograd.grad(terms['g_class']+terms['g_twin'], x)[0].abs().max()
    assert pull(twin)>1e-6 and pull(lambda x: dis(x)[1])<1e-9

def test_labels_asked_for_are_those_there_are():
    torch.manual_seed(0)
    y = one_hot_labels(PAIRS[:7])
    assert y.shape[1]==18 and (y.sum(1)==3).all()
    counts = pd.Series(map(tuple, ac_gan.sample_labels(ac_gan.label_pool(y), 20_000).tolist())).value_counts(normalize=True)
    truth = pd.Series(map(tuple, y.tolist())).value_counts(normalize=True)
    assert set(counts.index)==set(truth.index) and (counts-truth).abs().max()<.02

@pytest.mark.parametrize('n', [1, 3, 4, 5, 6, 76])
def test_each_film_as_often_as_there_are_passes(n):
    drawn = np.concatenate(batches := list(batch_indices(n, 5, 7)))
    assert {len(b) for b in batches}=={5} and (np.bincount(drawn[:7*n], minlength=n)==7).all() and len(drawn)-7*n<5

# Runs that stop

@pytest.fixture(scope='module')
def killed(tmp_path_factory):
    "All three models, killed with signal 9 in the midst of training"
    top = tmp_path_factory.mktemp('killed')
    code = ('import sys, torch; torch.set_num_threads(1); sys.path.insert(0, {tests!r}); import test_gans as t\n'
            'train, more = t.TRAIN[{model!r}]; train(t.FILMS, t.PAIRS, t.PAIRS, {out!r}, epochs=2000, every=2, **t.SMALL, **more)')
    env = os.environ | {'PYTHONPATH': os.pathsep.join([str(ROOT), os.environ.get('PYTHONPATH', '')])}
    running = {m: subprocess.Popen([sys.executable, '-c', code.format(tests=str(ROOT/'tests'), model=m, out=str(top/m))], env=env, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) for m in TRAIN}
    end = time.time()+100
    while time.time()<end and any(p.poll() is None for p in running.values()):
        for m,p in running.items():
            if list((top/m).glob('**/samples/0004')) and p.poll() is None: p.send_signal(signal.SIGKILL)
        time.sleep(.01)
    for p in running.values(): p.kill(), p.wait()
    assert [p.returncode for p in running.values()]==[-9]*3
    return top

@pytest.mark.parametrize('model', list(TRAIN))
def test_killed_run_ends_as_if_undisturbed(model, killed, tmp_path):
    train, more = TRAIN[model]
    files = sorted(killed.glob(f'{model}/**/checkpoint.safetensors'))
    epochs = 4+2*max(-(-load_checkpoint(f, {})['step']*5//(4 if model=='wgan_gp' else 2*len(FILMS))) for f in files)   # beyond where any of its models, of two films, stands
    for out in (killed/model, tmp_path/'undisturbed'): train(FILMS, PAIRS, PAIRS, out, epochs=epochs, every=2, **SMALL, **more)
    whole = sorted((tmp_path/'undisturbed').glob('**/checkpoint.safetensors'))
    assert [f.relative_to(tmp_path/'undisturbed') for f in whole]==[f.relative_to(killed/model) for f in sorted(killed.glob(f'{model}/**/checkpoint.safetensors'))]
    for f in whole:
        a, b = load_file(f), load_file(killed/model/f.relative_to(tmp_path/'undisturbed'))
        assert a.keys()==b.keys() and all(torch.equal(a[k], b[k]) for k in a if model!='wgan_gp' or k!='rng/cpu')   # models of a WGAN-GP have random numbers of their own
        assert previous_checkpoint(f).exists()
    samples = [{p.relative_to(top): p.read_bytes() for p in top.glob('samples/*/*.png')} for top in (tmp_path/'undisturbed', killed/model)]
    assert samples[0] and samples[0]==samples[1]

@pytest.mark.parametrize('model', list(TRAIN))
def test_broken_numbers_stop_a_run(model, tmp_path):
    train, more = TRAIN[model]
    rates = {'lr': 1e30} if model=='wgan_gp' else {'lr_g': 1e30, 'lr_d': 1e30}
    with pytest.raises(TrainingDiverged, match='numbers broke in minibatch'): train(FILMS, PAIRS, PAIRS, tmp_path/'x', epochs=20, every=5, **SMALL, **rates, **more)
    note, = (tmp_path/'x').glob('**/blown.json')
    said, good = json.loads(note.read_text()), load_file(note.with_name('checkpoint.safetensors'))
    assert said['indices']==list(batch_indices(2 if model=='wgan_gp' else len(FILMS), 5, 20))[said['step']-1].tolist() and said['seed']==0
    assert all(t.isfinite().all() for t in good.values() if t.is_floating_point())
    films = sample_checkpoint(note.parent, **({'n': 2} if model=='wgan_gp' else {'labels': [('normal', 'AP', 'L')]*2}), device='cpu')
    assert films.shape==(2, 32, 32)

@pytest.mark.parametrize('model', list(TRAIN))
def test_a_film_for_each_pair_of_test_and_validation(model, tmp_path):
    train, more = TRAIN[model]
    pairs = pd.concat([PAIRS.assign(pair=PAIRS.pair+k, patient=PAIRS.patient+k) for k in 'abc'], ignore_index=True)
    spare = gan.validation_mask(pairs, .2)
    train(FILMS.repeat(3, 0), pairs, PAIRS, tmp_path/'x', epochs=1, every=1, **SMALL, **(more | {'max_models': 28} if model=='wgan_gp' else more), validation_fraction=.2)
    names = lambda kind: {p.stem for p in (tmp_path/'x'/kind/'0001').iterdir()}
    lost = set(pd.read_csv(tmp_path/'x'/'missing.csv').pair) if model=='wgan_gp' else set()
    assert names('samples')|lost==set(PAIRS.pair) and not names('samples')&lost and names('validation')==set(pairs.pair[spare])
    checks = pd.read_json(next((tmp_path/'x').glob('**/checks.jsonl')), lines=True)
    assert {'ms_ssim_fake', 'ms_ssim_real', 'nearest_fake', 'nearest_real', 'collapse'}<=set(checks) and (model=='wgan_gp' or checks.class_right_held.notna().all())

def test_models_that_cannot_be_trained_are_accounted_for(tmp_path):
    "Of 28 models most have no films here, one has two: each is in the table with its reason, and each test pair is drawn for or in the other table"
    test = pd.concat([PAIRS, PAIRS[:2].assign(pair=['g0__x', 'g1__x'], pathology='olecranon fracture')], ignore_index=True)
    models = wgan_gp.train_wgan_gp(FILMS, PAIRS, test, tmp_path/'x', epochs=1, checkpoint_every=1, max_models=3, n_critic=1, **SMALL)
    missing = pd.read_csv(tmp_path/'x'/'missing.csv')
    drawn = {p.stem for p in (tmp_path/'x'/'samples'/'0001').iterdir()}
    assert len(models)==28 and models.n_test.sum()==len(test) and len(missing)+len(drawn)==len(test) and not set(missing.pair)&drawn
    assert {'no training films', 'not among the 3 largest'}==set(missing.reason)
    assert (models[models.trained=='yes'].reason=='fewer films than a batch of 5: repeated within it').all()

# The benchmark

def test_benchmark_runs(tmp_path):
    done = subprocess.run([sys.executable, str(ROOT/'bench'/'gans.py'), '--quick', '--models', 'wgan_gp', '--device', 'cpu', '--out', str(tmp_path)], capture_output=True, text=True, timeout=170)
    assert done.returncode==0, done.stderr
    said, = (json.loads(p.read_text()) for p in tmp_path.glob('*.json'))
    assert [(r['model'], r['way']) for r in said['rows']]==[('wgan_gp', 'plain'), ('wgan_gp', 'ours')] and all(r['ms']>0 and r['peak_mib']>0 for r in said['rows'])
    assert 'Nothing here was measured on a GPU' in next(tmp_path.glob('*.md')).read_text()

"The three GANs: optimized training against the plain version, resumption after kill -9, divergence, and which network each loss trains"
import copy, hashlib, json, re, shutil, subprocess, sys
from dataclasses import fields, replace
from pathlib import Path
import numpy as np, pandas as pd
import pytest, torch
from torch import nn
from safetensors.torch import load_file
from conftest import N_KILLS, ROOT
from kills import differing_files, run_with_kills
from elbowsynth.data.classes import PATHOLOGIES as ALL_PATHOLOGIES
from elbowsynth.data.images import read_image
from elbowsynth.gans import ac_gan, gan, tac_gan, wgan_gp
from elbowsynth.gans.gan import adam, one_hot_labels, sample_checkpoint, UpConv
from elbowsynth.gans.settings import ACGANConfig, TACGANConfig, WGANGPConfig
from elbowsynth.training import (
    batch_indices, DamagedFile, lock_training, previous_checkpoint, TrainingDiverged)

# What the first optimizer imports takes seconds: once for all runs that `kills` forks
if Path(sys.argv[0]).name=='kills.py': import torch._dynamo         # noqa: F401

FIELD_SIZES = [14, 2, 2]
PATHOLOGIES = ['normal', 'joint effusion', 'supracondylar fracture']
PAIRS = pd.DataFrame(
    [(f'f{i}__x', f'p{i}', PATHOLOGIES[i%3], ['AP', 'LAT'][i%2], 'LR'[i//2%2]) for i in range(12)],
    columns=['pair', 'patient', 'pathology', 'view', 'side'])
IMAGES = np.random.default_rng(0).integers(256, size=(len(PAIRS), 32, 32), dtype=np.uint8)
SMALL = dict(width=1/16, device='cpu', log_every=5)
# Model to its training function and further settings
TRAIN = {'wgan_gp': (wgan_gp.train_wgan_gp, {'n_critic': 2, 'max_models': 2}),
         'ac_gan': (ac_gan.train_ac_gan, {}), 'tac_gan': (tac_gan.train_tac_gan, {})}
# Loss functions of generator, discriminator and twin
LOSSES = {'ac_gan': (ac_gan.generator_losses, ac_gan.discriminator_losses),
          'tac_gan': (tac_gan.tac_generator_losses, tac_gan.tac_discriminator_losses, tac_gan.twin_losses)}

@pytest.fixture(autouse=True)
def one_thread():
    "Small tensors are slow on many threads, and the order of a sum is fixed on one"
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)

def assert_close(actual, expected, eps):
    "Largest difference, relative to the largest element of each tensor"
    for a,b in zip(actual, expected, strict=True):
        difference, largest = (a-b).abs().max(), b.abs().max()
        assert difference<=eps*max(largest, 1e-12), (difference, largest)

def count_parameters(net): return sum(p.numel() for p in net.parameters())

# The networks

def test_counts_with_biases_that_batch_norm_would_undo():
    "As other code counts: a bias for every layer (gans.md, section 1)"
    with torch.device('meta'):
        nets = [wgan_gp.Generator(), wgan_gp.Critic(), ac_gan.Generator(), ac_gan.Discriminator(),
                tac_gan.TwinClassifier()]
    def count_omitted_biases(net):
        layers = [m for m in net.modules() if isinstance(m, (nn.Linear, nn.Conv2d)) and m.bias is None]
        return sum(layer.weight.shape[0] for layer in layers)
    counts = [count_parameters(net) for net in nets]
    with_biases = [count_parameters(net)+count_omitted_biases(net) for net in nets]
    assert counts==[35_123_425, 10_890_241, 1_516_477, 137_679, 135_630]
    assert with_biases==[35_254_977, 10_890_241, 1_520_825, 137_931, 135_882]

@pytest.mark.parametrize('bias,total', [(False, 123_791), (True, 124_011)])
def test_counts_of_the_other_reading_of_table_5(bias, total):
    "Five convolutions as printed need a stride of 4 to come from side 32 to side 8; ours inserts a sixth (gans.md, section 1.2)"
    channels = [1, 4, 8, 16, 64, 128]
    rows = []
    for n_in,n_out in zip(channels, channels[1:]):
        conv = nn.Conv2d(n_in, n_out, 3, 4 if n_out==64 else 2, 1, bias=bias)
        rows.append(nn.Sequential(conv, nn.BatchNorm2d(n_out)))
    shapes = gan.block_shapes(nn.Sequential(*rows), torch.zeros(2, 1, 256, 256))
    assert shapes==[(4, 128, 128), (8, 64, 64), (16, 32, 32), (64, 8, 8), (128, 4, 4)]
    heads = 2048*(1+18)+1+18
    assert sum(count_parameters(row) for row in rows)+heads==total

def test_last_row_does_not_upsample():
    generators = [(wgan_gp.Generator(32, 1/16), 256), (ac_gan.Generator(32, 1/16), 274)]
    for net,n_inputs in generators:
        shapes = gan.block_shapes(net, torch.randn(2, n_inputs))
        assert shapes[-2][1:]==shapes[-1][1:]==(32, 32) and shapes[-1][0]==1
        assert not any(isinstance(m, UpConv) for m in net[-1].modules())

@pytest.mark.parametrize('model', ['wgan_gp', 'ac_gan'])
def test_fused_generator_equals_the_generator_of_the_tables(model, monkeypatch):
    torch.manual_seed(0)
    if model=='wgan_gp':
        net = wgan_gp.Generator(64, 1/8).double()
        inputs = [torch.randn(5, 256, dtype=torch.double)]
    else:
        net = ac_gan.Generator(64, 1/2).double()
        inputs = torch.randn(5, 274, dtype=torch.double).split([256, 18], 1)
    results = []
    for fused in (True, False):
        monkeypatch.setattr(UpConv, 'fused', fused)
        net_copy = copy.deepcopy(net)
        net_copy(*inputs).square().sum().backward()
        gradients = [p.grad for p in net_copy.parameters()]
        buffers = [b.double() for b in net_copy.buffers()]
        results.append([net_copy(*inputs).detach(), *gradients, *buffers])
    assert_close(*results, 1e-10)

# Labels and the terms of each loss, against formulas written here

def one_hot_by_hand(pairs):
    "14 pathologies, 2 views, 2 sides"
    labels = np.zeros((len(pairs), 18), np.float32)
    for row,pair in enumerate(pairs.itertuples()):
        labels[row, ALL_PATHOLOGIES.index(pair.pathology)] = 1
        labels[row, 14+['AP', 'LAT'].index(pair.view)] = 1
        labels[row, 16+['L', 'R'].index(pair.side)] = 1
    return labels

def cross_entropy_by_hand(logits, labels, bounds=(0, 14, 16, 18)):
    "Summed over the label fields, averaged over the images"
    total = 0.
    for start,end in zip(bounds, bounds[1:]):
        exponentials = np.exp(logits[:, start:end])
        probabilities = exponentials/exponentials.sum(1, keepdims=True)
        total -= np.log((probabilities*labels[:, start:end]).sum(1)).mean()
    return total

class LookupNet:
    "Scores and logits from a table: an image is the number of its row"
    def __init__(self, n, seed):
        rng = np.random.default_rng(seed)
        self.scores, self.logits = rng.normal(0, 3, (n, 1)), rng.normal(0, 2, (n, 18))
    def __call__(self, x):
        rows = x.flatten().long().numpy()
        return torch.from_numpy(self.scores[rows]), torch.from_numpy(self.logits[rows])

@pytest.fixture(scope='module')
def lookup():
    "A discriminator, a twin, four real images (rows 0 to 3) with labels and four generated ones (4 to 7) with other labels"
    dis,twin = LookupNet(8, 0), LookupNet(8, 1)
    labels = one_hot_by_hand(PAIRS)
    y,y_fake = labels[:4], labels[[5, 2, 7, 4]]
    assert (y!=y_fake).any(1).all()
    x,fake = torch.arange(8.).reshape(2, 4, 1)
    return dis, twin, x, fake, torch.from_numpy(y).double(), torch.from_numpy(y_fake).double()

def values_of(terms): return {name: value.item() for name,value in terms.items()}

def test_labels_are_one_hot_in_the_order_of_the_tables():
    assert np.array_equal(one_hot_labels(PAIRS).numpy(), one_hot_by_hand(PAIRS))

@pytest.mark.parametrize('classify_fakes', [True, False])
def test_terms_of_the_discriminator(lookup, classify_fakes):
    dis,_,x,fake,y,y_fake = lookup
    terms = ac_gan.discriminator_losses(dis, x, y, fake, y_fake, FIELD_SIZES, classify_fakes)
    expected = {'d_loss_real': np.log(1+np.exp(-dis.scores[:4])).mean(),
                'd_loss_fake': np.log(1+np.exp(dis.scores[4:])).mean(),
                'd_class_real': cross_entropy_by_hand(dis.logits[:4], y.numpy())}
    if classify_fakes: expected['d_class_fake'] = cross_entropy_by_hand(dis.logits[4:], y_fake.numpy())
    assert values_of(terms)==pytest.approx(expected, rel=1e-9)

def test_terms_of_the_conditional_generators(lookup):
    dis,twin,_,fake,_,y_fake = lookup
    expected = {'g_adv': np.log(1+np.exp(-dis.scores[4:])).mean(),
                'g_class': cross_entropy_by_hand(dis.logits[4:], y_fake.numpy())}
    terms = ac_gan.generator_losses(dis, fake, y_fake, FIELD_SIZES)
    assert values_of(terms)==pytest.approx(expected, rel=1e-9)
    expected['g_twin'] = -cross_entropy_by_hand(twin.logits[4:], y_fake.numpy())
    def twin_logits(x): return twin(x)[1]
    terms = tac_gan.tac_generator_losses(dis, twin_logits, fake, y_fake, FIELD_SIZES)
    assert values_of(terms)==pytest.approx(expected, rel=1e-9)

def test_terms_of_the_critic():
    "A critic of half the squared norm has the image itself as gradient; real and generated images are the same for the penalty, so that the position between them does not matter"
    def critic(x): return x.square().flatten(1).sum(1, keepdim=True)/2
    rng = np.random.default_rng(0)
    real,fake = rng.normal(0, .4, (2, 5, 1, 4, 4))
    norms = np.sqrt((real**2).sum((1, 2, 3)))
    penalty = ((norms-1)**2).mean()
    same = torch.from_numpy(real)
    assert wgan_gp.gradient_penalty(critic, same, same).item()==pytest.approx(penalty)
    loss,distance,_ = wgan_gp.critic_loss(critic, same, torch.from_numpy(fake), 0.)
    expected = (real**2).sum((1, 2, 3)).mean()/2-(fake**2).sum((1, 2, 3)).mean()/2
    assert (distance.item(), loss.item())==pytest.approx((expected, -expected))
    loss,distance,_ = wgan_gp.critic_loss(critic, same, same, 3.)
    assert (distance.item(), loss.item())==pytest.approx((0, 3*penalty))
    assert wgan_gp.generator_loss(critic, torch.from_numpy(fake)).item()==pytest.approx(-(fake**2).sum((1, 2, 3)).mean()/2)

def test_penalty_is_between_real_and_generated_images():
    "Positions are uniform between the two: with real images of 2 and generated ones of 0, norms are uniform between 0 and 2"
    torch.manual_seed(0)
    def critic(x): return x.square().flatten(1).sum(1, keepdim=True)/2
    real = torch.full((20_000, 1, 1, 1), 2.)
    penalty = wgan_gp.gradient_penalty(critic, real, torch.zeros_like(real))
    assert penalty.item()==pytest.approx(1/3, abs=.01)         # the mean of (u-1)² for u in [0, 2]

# The gradient penalty

def with_masks(critic, masks):
    "The critic with known dropout masks of probability .25, as a function"
    def net(x):
        for (conv,_,_),mask in zip(list(critic)[:-1], masks):
            x = nn.functional.elu(conv(x), .2)*mask/.75
        return critic[-1](x)
    return net

def plain_critic_loss(critic, real, fake, gp_weight, eps, masks):
    "By autograd, in three passes"
    n = len(real)
    critics = [with_masks(critic, [mask[i*n:(i+1)*n] for mask in masks]) for i in range(3)]
    interpolated = (eps*real+(1-eps)*fake).requires_grad_()
    gradient, = torch.autograd.grad(critics[2](interpolated).sum(), interpolated, create_graph=True)
    distance = critics[0](real).mean()-critics[1](fake).mean()
    penalty = ((gradient.flatten(1).norm(2, dim=1)-1)**2).mean()
    return gp_weight*penalty-distance, distance, penalty

@pytest.mark.parametrize('dtype,eps_loss,eps_grad', [(torch.double, 1e-12, 1e-11), (torch.float, 1e-5, 1e-5)])
def test_written_out_penalty_equals_autograd(dtype, eps_loss, eps_grad):
    torch.manual_seed(0)
    critic = wgan_gp.Critic(64, 1/4).to(dtype)
    real,fake = torch.rand(2, 5, 1, 64, 64, dtype=dtype)*2-1
    masks = wgan_gp.critic_forward(critic, torch.cat([real, fake, fake]))[2]
    eps = torch.rand(5, 1, 1, 1, dtype=dtype)
    ours = wgan_gp.critic_gradients(critic, real, fake, 10., eps=eps, masks=masks)
    our_gradients = [p.grad.clone() for p in critic.parameters()]
    critic.zero_grad()
    loss,distance,penalty = plain_critic_loss(critic, real, fake, 10., eps, masks)
    loss.backward()
    gradients = [p.grad for p in critic.parameters()]
    assert_close([ours['wasserstein'], ours['gradient_penalty']], [distance.detach(), penalty.detach()], eps_loss)
    assert_close(our_gradients[:-1], gradients[:-1], eps_grad)
    assert our_gradients[-1]==0 and critic[-1][1].bias.grad.abs()<1e-6      # a constant in the scores has no effect

def test_penalty_equals_torch_func():
    "A third implementation: torch.func.grad, image by image"
    torch.manual_seed(1)
    critic = wgan_gp.Critic(32, 1/8).double()
    x = torch.rand(5, 1, 32, 32, dtype=torch.double)
    masks = wgan_gp.critic_forward(critic, torch.cat([x, x, x]))[2]
    norms = []
    for i in range(5):
        net = with_masks(critic, [mask[10+i:11+i] for mask in masks])
        norms.append(torch.func.grad(lambda image: net(image[None]).sum())(x[i]).norm())
    norms = torch.stack(norms).detach()
    ours = wgan_gp.critic_gradients(critic, x, x, 10., eps=torch.ones(5, 1, 1, 1), masks=masks)
    assert_close([ours['gradient_penalty'], ours['interp_grad_norm_max']], [((norms-1)**2).mean(), norms.max()], 1e-12)

def test_penalty_does_not_couple_images():
    "The order of images does not matter, and the gradient norm of an image does not depend on the rest of the batch"
    torch.manual_seed(2)
    critic = wgan_gp.Critic(32, 1/8, dropout=0).double()
    x = torch.rand(5, 1, 32, 32, dtype=torch.double)
    def penalty(images):
        eps = torch.ones(len(images), 1, 1, 1)
        return wgan_gp.critic_gradients(critic, images, images, 10., eps=eps)['gradient_penalty']
    single = torch.stack([penalty(x[i:i+1]) for i in range(5)])
    assert abs(penalty(x)-penalty(x.flip(0)))<1e-14
    assert abs(penalty(x)-single.mean())<1e-14

# Our training steps and the plain ones

def minimize(opt, loss):
    opt.zero_grad()
    loss.backward()
    opt.step()

def plain_mask(shape, dtype, rng):
    "A dropout mask of probability .25: an element is dropped if its random byte is below 64"
    n = int(np.prod(shape))
    words = torch.empty(-(-n//8), dtype=torch.int64).random_(-2**63, None, generator=rng)
    random_bytes = torch.from_numpy(words.numpy().view(np.uint8)[:n])
    return (random_bytes>=64).to(dtype).view(shape)

def plain_masks(critic, n_images, size, dtype, rng):
    shapes = [(n_images, block[0].out_channels, size>>i, size>>i)
              for i,block in enumerate(list(critic)[:-1], 1)]
    return [plain_mask(shape, dtype, rng) for shape in shapes]

def plain_wgan_step(gen, critic, opt_g, opt_c, real, gp_weight, critic_updates, update_generator, rng):
    "The same random numbers, everything by autograd, no network frozen"
    n,size = len(real), real.shape[-1]
    def noise(): return torch.randn(n, 256, dtype=real.dtype, generator=rng)
    for _ in range(critic_updates):
        fake = gen(noise()).detach()
        eps = torch.rand(n, 1, 1, 1, generator=rng)
        masks = plain_masks(critic, 3*n, size, real.dtype, rng)
        loss,distance,penalty = plain_critic_loss(critic, real, fake, gp_weight, eps, masks)
        minimize(opt_c, loss)
    if update_generator:
        fake = gen(noise())
        masks = plain_masks(critic, n, size, real.dtype, rng)
        minimize(opt_g, -with_masks(critic, masks)(fake).mean())
    return {'wasserstein': distance, 'gradient_penalty': penalty}

def plain_adversarial(scores, real):
    "Binary cross-entropy of scores that should say real, or generated"
    targets = torch.ones_like(scores) if real else torch.zeros_like(scores)
    return nn.functional.binary_cross_entropy_with_logits(scores, targets)

def plain_class(logits, labels, sizes):
    total = 0.
    for field_logits,field_labels in zip(logits.split(sizes, 1), labels.split(sizes, 1)):
        total = total-(field_logits.log_softmax(1)*field_labels).sum(1).mean()
    return total

def plain_conditional_step(nets, opts, x, y, pool, sizes):
    "A step of the AC-GAN, or with three networks of the TAC-GAN, with no network frozen"
    gen,dis,*twin = nets
    def noise(): return torch.randn(len(x), 256, dtype=x.dtype)
    def labels(): return pool[torch.randint(len(pool), (len(x),))]
    y_fake = labels()
    fake = gen(noise(), y_fake).detach()
    score,logits = dis(x)
    score_fake,logits_fake = dis(fake)
    terms = {'d_loss_real': plain_adversarial(score, True), 'd_loss_fake': plain_adversarial(score_fake, False),
             'd_class_real': plain_class(logits, y, sizes)}
    if not twin: terms['d_class_fake'] = plain_class(logits_fake, y_fake, sizes)
    minimize(opts[1], sum(terms.values()))
    if twin:
        terms['twin_loss'] = plain_class(twin[0](fake), y_fake, sizes)
        minimize(opts[2], terms['twin_loss'])
    y_fake = labels()
    fake = gen(noise(), y_fake)
    score,logits = dis(fake)
    g_terms = {'g_adv': plain_adversarial(score, True), 'g_class': plain_class(logits, y_fake, sizes)}
    if twin: g_terms['g_twin'] = -plain_class(twin[0](fake), y_fake, sizes)
    minimize(opts[0], sum(g_terms.values()))
    return terms | g_terms

def make_optimizer(ours, params, lr, betas, weight_decay=0.):
    if ours: return adam(params, lr, betas, weight_decay)
    return torch.optim.Adam(params, lr, betas, weight_decay=weight_decay, foreach=False)

def state_after(model, ours, n_steps, dtype, monkeypatch):
    "State of all networks and gradients of the generator after some steps, ours or plain, with the same random numbers"
    monkeypatch.setattr(UpConv, 'fused', ours)
    torch.manual_seed(0)
    y = one_hot_labels(PAIRS).to(dtype)
    if model=='wgan_gp':
        nets = [wgan_gp.Generator(32, 1/8).to(dtype), wgan_gp.Critic(32, 1/8).to(dtype)]
        rng = torch.Generator().manual_seed(5)
        opts = [make_optimizer(ours, net.parameters(), 2e-4, (.5, .9), 1e-4) for net in nets]
    else:
        nets = [ac_gan.Generator(32, 1/4).to(dtype), ac_gan.Discriminator(32, 1/4).to(dtype)]
        if model=='tac_gan': nets.append(tac_gan.TwinClassifier(32, 1/4).to(dtype))
        opts = [make_optimizer(ours, net.parameters(), 5e-4, (.5, .999)) for net in nets]
    for indices in list(batch_indices(len(IMAGES), 5, 100))[:n_steps]:
        x = (torch.from_numpy(IMAGES[indices])[:, None]/127.5-1).to(dtype)
        if model=='wgan_gp' and ours: wgan_gp.wgan_step(*nets, *opts, x, 7., 3, True, rng)
        elif model=='wgan_gp': plain_wgan_step(*nets, *opts, x, 7., 3, True, rng)
        elif not ours: plain_conditional_step(nets, opts, x, y[indices], y, FIELD_SIZES)
        else: ac_gan.conditional_gan_step(nets, opts, LOSSES[model], x, y[indices], y, FIELD_SIZES)
    state = [t.double() for net in nets for t in net.state_dict().values()]
    return state, [p.grad.double() for p in nets[0].parameters()]

@pytest.mark.long('reference implementations, 10 s')
@pytest.mark.parametrize('model', list(TRAIN))
def test_twenty_steps_in_double_precision(model, monkeypatch):
    ours,_ = state_after(model, True, 20, torch.double, monkeypatch)
    plain,_ = state_after(model, False, 20, torch.double, monkeypatch)
    for a,b in zip(ours, plain, strict=True): assert (a-b).abs().max()<1e-9

@pytest.mark.parametrize('model', list(TRAIN))
def test_one_step_in_single_precision(model, monkeypatch):
    "The generator's gradient, after the critic's or discriminator's update; relative to its norm"
    _,ours = state_after(model, True, 1, torch.float, monkeypatch)
    _,plain = state_after(model, False, 1, torch.float, monkeypatch)
    ours,plain = (torch.cat([g.flatten() for g in gradients]) for gradients in (ours, plain))
    assert (ours-plain).norm()<=1e-5*plain.norm()

def test_class_head_with_an_optimizer_of_its_own_is_bit_identical():
    "So Table 5's classifier optimizer makes no difference as long as the learning rates are equal"
    states = []
    for separate in (False, True):
        torch.manual_seed(0)
        dis = ac_gan.Discriminator(32, 1/4)
        body = [*dis.trunk.parameters(), *dis.adv_head.parameters()]
        head = list(dis.class_head.parameters())
        if separate: opts = [adam(body, 2e-4, (.5, .999)), adam(head, 2e-4, (.5, .999))]
        else: opts = [adam([{'params': body}, {'params': head, 'lr': 2e-4}], 2e-4, (.5, .999))]
        for _ in range(20):
            for opt in opts: opt.zero_grad()
            score,logits = dis(torch.randn(5, 1, 32, 32))
            (score.square().mean()+logits.square().mean()).backward()
            for opt in opts: opt.step()
        states.append(list(dis.state_dict().values()))
    assert all(torch.equal(a, b) for a,b in zip(*states))

@pytest.mark.long('compiles, 8 s')
def test_losses_can_be_compiled():
    "Into one graph, for any network; the values do not change"
    torch.manual_seed(0)
    dis = ac_gan.Discriminator(32, 1/16).eval()
    x,y = torch.randn(4, 1, 32, 32), one_hot_labels(PAIRS)[:4]
    args = dis, x, y, -x, y, FIELD_SIZES
    plain = ac_gan.discriminator_losses(*args)
    compiled = torch.compile(ac_gan.discriminator_losses, backend='aot_eager', fullgraph=True)(*args)
    assert plain.keys()==compiled.keys()
    assert_close([v.detach() for v in compiled.values()], [v.detach() for v in plain.values()], 1e-6)

@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
@pytest.mark.parametrize('model', list(TRAIN))
def test_cuda_graphs_give_what_eager_gives(model, tmp_path, monkeypatch):
    train,options = TRAIN[model]
    for name in ('graph', 'eager'):
        if name=='eager':
            for module in (wgan_gp, ac_gan):                        # the TAC-GAN trains with a function of ac_gan
                monkeypatch.setattr(module, 'cuda_graphed', lambda step_fn, device, generators=(): step_fn)
        train(IMAGES, PAIRS, PAIRS, tmp_path/name, epochs=4, checkpoint_every=4, **SMALL | {'device': 'cuda'}, **options)
    files = sorted(tmp_path.glob('graph/**/checkpoint.safetensors'))
    assert files
    for file in files:
        graph = load_file(file)
        eager = load_file(tmp_path/'eager'/file.relative_to(tmp_path/'graph'))
        weights = [k for k in graph if k.startswith(('gen/', 'critic/', 'dis/'))]
        assert all(torch.allclose(graph[k].float(), eager[k].float(), atol=1e-3) for k in weights)

# Which network each loss trains

def test_each_step_trains_one_network():
    torch.manual_seed(0)
    nets = [ac_gan.Generator(32, 1/16), ac_gan.Discriminator(32, 1/16), tac_gan.TwinClassifier(32, 1/16)]
    dis = nets[1]
    y,x = one_hot_labels(PAIRS)[:5], torch.randn(5, 1, 32, 32)
    has_gradient = []
    class RecordingOptimizer:
        "Notes at each step which networks have a gradient"
        def zero_grad(self):
            for net in nets: net.zero_grad(set_to_none=True)
        def step(self): has_gradient.append([any(p.grad is not None for p in net.parameters()) for net in nets])
    buffers = [b.clone() for b in dis.buffers()]
    opts = RecordingOptimizer(), RecordingOptimizer(), RecordingOptimizer()
    ac_gan.conditional_gan_step(nets, opts, LOSSES['tac_gan'], x, y, y, FIELD_SIZES)
    assert has_gradient==[[False, True, False], [False, False, True], [True, False, False]]     # D, then C, then G
    assert all(p.requires_grad for net in nets for p in net.parameters())
    norms = [m for m in dis.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms[0].num_batches_tracked==3      # real, fake and the generator's step, all in training mode
    assert not any(torch.equal(a, b) for a,b in zip(buffers, dis.buffers()))

def test_generator_step_of_the_wgan_gives_the_critic_no_gradient():
    torch.manual_seed(0)
    gen,critic = wgan_gp.Generator(32, 1/16), wgan_gp.Critic(32, 1/16)
    output_grad = wgan_gp.generator_output_grad(critic, gen(torch.randn(5, 256)).detach())
    assert all(p.grad is None for net in (gen, critic) for p in net.parameters())
    assert output_grad.abs().sum()>0

def test_twin_cannot_be_the_class_head_of_the_discriminator():
    "With the class head as the twin both class terms cancel, which shows in the gradient"
    torch.manual_seed(0)
    dis,twin = ac_gan.Discriminator(32, 1/16).eval(), tac_gan.TwinClassifier(32, 1/16).eval()
    y = one_hot_labels(PAIRS)[:5]
    def largest_gradient(second_classifier):
        x = torch.full((5, 1, 32, 32), .1, requires_grad=True)
        losses = tac_gan.tac_generator_losses(dis, second_classifier, x, y, FIELD_SIZES)
        return torch.autograd.grad(losses['g_class']+losses['g_twin'], x)[0].abs().max()
    assert largest_gradient(twin)>1e-6 and largest_gradient(lambda x: dis(x)[1])<1e-9

def test_sampled_labels_have_the_frequencies_of_the_training_pairs():
    torch.manual_seed(0)
    y = one_hot_labels(PAIRS[:7])
    assert y.shape[1]==18 and (y.sum(1)==3).all()
    def frequencies(labels): return pd.Series(map(tuple, labels.tolist())).value_counts(normalize=True)
    sampled = frequencies(ac_gan.sample_labels(ac_gan.label_pool(y), 20_000))
    expected = frequencies(y)
    assert set(sampled.index)==set(expected.index) and (sampled-expected).abs().max()<.02

@pytest.mark.parametrize('n', [1, 3, 4, 5, 6, 76])
def test_each_image_is_used_once_an_epoch(n):
    batches = list(batch_indices(n, 5, 7))
    indices = np.concatenate(batches)
    assert {len(batch) for batch in batches}=={5}
    assert (np.bincount(indices[:7*n], minlength=n)==7).all() and len(indices)-7*n<5

# Settings

@pytest.mark.parametrize('model', list(TRAIN))
def test_unknown_settings_are_refused(model, tmp_path):
    train,options = TRAIN[model]
    with pytest.raises(TypeError, match="'epoch'"): train(IMAGES, PAIRS, PAIRS, tmp_path/'x', epoch=3, **SMALL, **options)
    assert not (tmp_path/'x').exists()

# Every setting differs from its default and from what the other models use
CONDITIONAL = dict(
    width=1/8, epochs=3, checkpoint_every=2, batch_size=4, lr_g=3e-3, lr_d=2e-3, lr_classifier=1e-3,
    betas=(.3, .8), dropout=.4, label_fields=('view', 'pathology'), n_labels=16, label_sampling='uniform',
    validation_fraction=.25, seed=3, device='cpu', log_every=2, tensorboard=True, compile=True, max_minutes=99.)
UNUSUAL = {
    'wgan_gp': WGANGPConfig(
        width=1/16, epochs=4, checkpoint_every=3, batch_size=3, n_critic=2, gp_weight=300., lr=2e-3,
        betas=(.3, .8), weight_decay=.3, batch_reuse='per_update', max_models=3, min_images=4,
        validation_fraction=.25, n_parallel=2, seed=3, device='cpu', log_every=2, tensorboard=True, max_minutes=99.),
    'ac_gan': ACGANConfig(**CONDITIONAL), 'tac_gan': TACGANConfig(**CONDITIONAL)}
# Settings that change the weights, which are compared with those of a plain training
OF_WEIGHTS = {
    'wgan_gp': {'width', 'epochs', 'batch_size', 'n_critic', 'gp_weight', 'lr', 'betas', 'weight_decay',
                'batch_reuse', 'validation_fraction', 'seed'},
    'ac_gan': {'width', 'epochs', 'batch_size', 'lr_g', 'lr_d', 'lr_classifier', 'betas', 'dropout',
               'label_fields', 'n_labels', 'label_sampling', 'validation_fraction', 'seed'}}
OF_WEIGHTS['tac_gan'] = OF_WEIGHTS['ac_gan']
# Settings that do not, and the test that sees that they are used
OF_THE_RUN = {
    'checkpoint_every': 'samples', 'max_models': 'models', 'min_images': 'models', 'n_parallel': 'calls',
    'device': 'device', 'log_every': 'log', 'tensorboard': 'log', 'max_minutes': 'calls', 'compile': 'calls'}

def toy_pairs(prefix, n):
    "Each pathology and view with left and right elbows; most pairs are of lateral effusions"
    rows = []
    for i in range(n):
        pathology,view = [('normal', 'AP'), ('joint effusion', 'LAT'), ('normal', 'LAT'), ('joint effusion', 'LAT')][i%4]
        rows.append((f'{prefix}{i}__x', f'{prefix}{i}', pathology, view, 'LR'[i//2%3>0]))
    return pd.DataFrame(rows, columns=['pair', 'patient', 'pathology', 'view', 'side'])

MANY, TEST = toy_pairs('train', 24), toy_pairs('test', 9)
MANY_IMAGES = np.random.default_rng(1).integers(256, size=(len(MANY), 32, 32), dtype=np.uint8)
MODELS_OF_UNUSUAL = [('LAT', 'joint effusion'), ('AP', 'normal'), ('LAT', 'normal')]

def of_model(table, model): return ((table.view==model[0]) & (table.pathology==model[1])).values

def mirrored(images, sides):
    "Images of right elbows from right to left, one at a time"
    return np.stack([image[:, ::-1] if side=='R' else image for image,side in zip(images, sides)])

def labels_by_hand(pairs, label_fields):
    order = {'pathology': range(14), 'view': (14, 15), 'side': (16, 17)}
    return one_hot_by_hand(pairs)[:, [i for field in label_fields for i in order[field]]]

def scaled(images): return torch.from_numpy(images[:, None].astype(np.float32)/127.5-1)

def plain_wgan_training(config, pairs, images):
    "One WGAN-GP by autograd; the networks at first and at last, and the terms of each step"
    torch.manual_seed(config.seed)
    rng = torch.Generator().manual_seed(config.seed)
    nets = [wgan_gp.Generator(32, config.width), wgan_gp.Critic(32, config.width)]
    initial = copy.deepcopy(nets)
    opts = [torch.optim.Adam(net.parameters(), config.lr, config.betas, weight_decay=config.weight_decay) for net in nets]
    images = mirrored(images, pairs.side)
    terms = []
    for i,indices in enumerate(batch_indices(len(images), config.batch_size, config.epochs, config.seed), 1):
        if config.batch_reuse=='per_update': updates = 1, i%config.n_critic==0
        else: updates = config.n_critic, True
        terms.append(plain_wgan_step(*nets, *opts, scaled(images[indices]), config.gp_weight, *updates, rng))
    return dict(zip(('gen', 'critic'), zip(initial, nets))), terms

def plain_conditional_training(model, config, pairs, images):
    "An AC-GAN or a TAC-GAN; the networks at first and at last, and the terms of each step"
    torch.manual_seed(config.seed)
    sizes = [{'pathology': 14, 'view': 2, 'side': 2}[field] for field in config.label_fields]
    nets = [ac_gan.Generator(32, config.width, sum(sizes)),
            ac_gan.Discriminator(32, config.width, sum(sizes), config.dropout)]
    dis = nets[1]
    groups = [[{'params': nets[0].parameters(), 'lr': config.lr_g}], [{'params': dis.parameters(), 'lr': config.lr_d}]]
    if model=='tac_gan':
        nets.append(tac_gan.TwinClassifier(32, config.width, sum(sizes), config.dropout))
        groups.append([{'params': nets[2].parameters(), 'lr': config.lr_classifier}])
    else:
        body = [*dis.trunk.parameters(), *dis.adv_head.parameters()]
        groups[1] = [{'params': body, 'lr': config.lr_d},
                     {'params': dis.class_head.parameters(), 'lr': config.lr_classifier}]
    initial = copy.deepcopy(nets)
    opts = [torch.optim.Adam(group, betas=config.betas) for group in groups]
    y = torch.from_numpy(labels_by_hand(pairs, config.label_fields))
    pool = y if config.label_sampling=='empirical' else y.unique(dim=0)
    terms = []
    for indices in batch_indices(len(images), config.batch_size, config.epochs, config.seed):
        terms.append(plain_conditional_step(nets, opts, scaled(images[indices]), y[indices], pool, sizes))
    return dict(zip(('gen', 'dis', 'twin'), zip(initial, nets))), terms

def plain_training(model, config):
    "With the training pairs of `MANY`, for a WGAN-GP those of lateral effusions"
    used = ~gan.validation_mask(MANY, config.validation_fraction).values
    if model!='wgan_gp': return plain_conditional_training(model, config, MANY[used], MANY_IMAGES[used])
    used &= of_model(MANY, MODELS_OF_UNUSUAL[0])
    return plain_wgan_training(config, MANY[used], MANY_IMAGES[used])

def distances(weights, initial_and_final):
    "For each network: how far weights are from its final ones, relative to how far training moved it"
    result = {}
    for name,(initial,final) in initial_and_final.items():
        names = [key for key,_ in final.named_parameters()]
        first,last = ([dict(net.named_parameters())[key].detach() for key in names] for net in (initial, final))
        ours = [weights[f'{name}/{key}'] for key in names]
        if any(a.shape!=b.shape for a,b in zip(ours, last)): return {name: np.inf}
        off,moved = (torch.cat([(a-b).flatten() for a,b in zip(values, last)]).norm() for values in (ours, first))
        result[name] = float(off/moved)
    return result

@pytest.fixture(scope='module')
def unusual(tmp_path_factory):
    "A training of each model with the settings of `UNUSUAL`, and what some functions were called with"
    top = tmp_path_factory.mktemp('unusual')
    calls = {}
    def noted(module, name, result):
        original = getattr(module, name)
        def function(*args, **options):
            calls.setdefault(f'{module.__name__.split(".")[-1]}.{name}', []).append(args)
            return original(*args, **options) if result is None else result(*args)
        patch.setattr(module, name, function)
    with pytest.MonkeyPatch.context() as patch:
        for module in (wgan_gp, ac_gan): noted(module, 'progress', None)
        noted(wgan_gp, 'interleave', None)
        noted(ac_gan, 'maybe_compile', lambda f, device, compile: f)
        for model,config in UNUSUAL.items(): TRAIN[model][0](MANY_IMAGES, MANY, TEST, top/model, config)
    return top, calls

def folder_of(model, top, group=MODELS_OF_UNUSUAL[0]):
    return top/model/f'{group[0]}__{group[1].replace(" ", "_")}' if model=='wgan_gp' else top/model

@pytest.mark.parametrize('model', list(TRAIN))
def test_a_training_with_unusual_settings_ends_with_the_weights_of_a_plain_one(model, unusual):
    top,_ = unusual
    folder = folder_of(model, top)
    weights = load_file(folder/'checkpoint.safetensors')
    plain,terms = plain_training(model, UNUSUAL[model])
    assert max(distances(weights, plain).values())<2e-3, distances(weights, plain)
    log = pd.read_json(folder/'log.jsonl', lines=True).set_index('step')
    expected_steps = sorted({1, *range(2, len(terms)+1, 2)})
    assert log.index.tolist()==expected_steps
    for step in expected_steps:
        values = values_of(terms[step-1])
        assert log.loc[step, list(values)].to_dict()==pytest.approx(values, rel=2e-3, abs=1e-4)
    assert list((folder/'tensorboard'/'log').iterdir())

@pytest.mark.long('the power of the test above, a minute')
@pytest.mark.parametrize('model', list(TRAIN))
def test_that_comparison_would_see_each_setting(model, unusual):
    "With one setting at its default the plain training ends elsewhere"
    weights = load_file(folder_of(model, unusual[0])/'checkpoint.safetensors')
    unseen = []
    for name in sorted(OF_WEIGHTS[model]-{'n_labels'}):
        changes = {name: {'epochs': 2}.get(name, getattr(type(UNUSUAL[model])(), name))}
        if name=='label_fields': changes['n_labels'] = 18
        plain,_ = plain_training(model, replace(UNUSUAL[model], **changes))
        if max(distances(weights, plain).values())<=.02: unseen.append(name)
    assert unseen==[]

def test_each_setting_is_in_one_of_these_tests(unusual):
    for model,config in UNUSUAL.items():
        names = {field.name for field in fields(config)}-{'stop_epoch', 'only_models'}      # in test_parts.py
        assert names==OF_WEIGHTS[model] | names & OF_THE_RUN.keys() and not OF_WEIGHTS[model] & OF_THE_RUN.keys()
        same = [name for name in names if getattr(config, name)==getattr(type(config)(), name)]
        assert not same, f'{model}: the test uses the default of {same}'

def test_settings_of_the_run_are_used(unusual):
    top,calls = unusual
    assert [args[3] for args in calls['wgan_gp.progress']+calls['ac_gan.progress']]==[99.]*3
    assert [args[1] for args in calls['wgan_gp.interleave']]==[2]
    assert [args[2] for args in calls['ac_gan.maybe_compile']]==[True]*5       # two losses, and three
    epochs = {model: sorted(p.name for p in (top/model/'samples').iterdir()) for model in TRAIN}
    assert epochs=={'wgan_gp': ['0000', '0003', '0004'], 'ac_gan': ['0000', '0002', '0003'], 'tac_gan': ['0000', '0002', '0003']}
    models = pd.read_csv(top/'wgan_gp'/'models.csv')
    assert set(map(tuple, models[models.trained=='yes'][['view', 'pathology']].to_numpy()))==set(MODELS_OF_UNUSUAL)

@pytest.mark.parametrize('options,n_trained,reason', [({'max_models': 1}, 1, 'not among the 1 largest'), ({'min_images': 8}, 1, 'fewer than 8 training images')])
def test_fewer_models_on_request(options, n_trained, reason, tmp_path):
    models = wgan_gp.train_wgan_gp(MANY_IMAGES, MANY, TEST, tmp_path/'x', epochs=0, **SMALL, **options)
    assert (models.trained=='yes').sum()==n_trained and reason in set(models.reason)

@pytest.mark.parametrize('model', list(TRAIN))
def test_the_device_is_the_one_asked_for(model, tmp_path):
    train,options = TRAIN[model]
    with pytest.raises((RuntimeError, AssertionError), match='nowhere'):
        train(IMAGES, PAIRS, PAIRS, tmp_path/'x', epochs=0, **SMALL | {'device': 'nowhere'}, **options)

STAGES = {'wgan_gp': '36_wgan_gp', 'ac_gan': '37_ac_gan', 'tac_gan': '38_tac_gan', 'search': '39_search'}

@pytest.mark.parametrize('stage', list(STAGES))
def test_each_parameter_of_a_stage_reaches_its_training(stage):
    "The cell that trains, with a value of its own for each parameter"
    notebook = json.loads((ROOT/'nbs'/'3_gans'/f'{STAGES[stage]}.ipynb').read_text())
    cells = [(''.join(cell['source']), cell['metadata'].get('tags', [])) for cell in notebook['cells']]
    number = next(i for i,(_,tags) in enumerate(cells) if 'parameters' in tags)
    function = 'search_hyperparameters' if stage=='search' else f'train_{stage}'
    cell = next(source for source,_ in cells[number:] if f'{function}(' in source)
    namespace = {}
    exec(cells[number][0], namespace)
    names = [name for name in namespace if not name.startswith('__')]
    class Finished(Exception): pass
    def note(images, *data, **settings): raise Finished(images, data, settings)
    values = {name: f'value of {name}' for name in names}
    values |= {'run': 'RUN', 'split': 'SPLIT', 'images': 'IMAGES', 'out': 'OUT', 'hyperparameters_from': '', 'options': {'extra': 'value of extra'}}
    stubs = {'root': lambda: Path('top'), 'read_pairs': lambda folder, subset: pd.DataFrame({'image': [folder, subset]}),
             'load_images': lambda folder, names, size: (folder, *names, size), function: note,
             'best_hyperparameters': lambda folder, model: {'lr_g': (folder, model)},
             'read_study': lambda folder: ('study', folder)}
    used = [name for name in names if name not in ('run', 'split', 'images', 'out', 'size', 'hyperparameters_from', 'options')]
    with pytest.raises(Finished) as e: exec(cell, values | stubs)
    images,data,settings = e.value.args
    run = Path('top')/'RUN'
    assert images==(run/'IMAGES', run/'SPLIT', 'train', 'value of size') and data[-1]==run/'OUT'
    if stage!='search': assert data[1].image[1]=='test' and settings.pop('extra')=='value of extra'
    of_study = {'definition' if stage=='search' else 'study': ('study', run/'SPLIT')}
    assert settings=={name: f'value of {name}' for name in used} | of_study
    if 'hyperparameters_from' not in names: return
    with pytest.raises(Finished) as e: exec(cell, values | stubs | {'hyperparameters_from': 'FOUND'})
    assert e.value.args[2]['lr_g']==(run/'FOUND', stage)

# What is generated, and what is logged at a checkpoint

def noise_by_hand(names, seed):
    rows = []
    for name in names:
        digits = hashlib.sha256(json.dumps(name).encode()).hexdigest()[:12]
        rows.append(np.random.default_rng([seed, int(digits, 16)]).standard_normal(256, dtype=np.float32))
    return torch.from_numpy(np.stack(rows))

def trained_net(net, name, folder):
    tensors = load_file(folder/'checkpoint.safetensors')
    net.load_state_dict({k.removeprefix(f'{name}/'): v for k,v in tensors.items() if k.startswith(f'{name}/')})
    return net.eval()

def gray_levels(x): return np.rint((x.detach().numpy()[:, 0].clip(-1, 1)+1)*127.5)

def expected_samples(model, top, pairs):
    "The last checkpoint's images of some pairs"
    config = UNUSUAL[model]
    noise = noise_by_hand(pairs.pair, config.seed)
    if model!='wgan_gp':
        gen = trained_net(ac_gan.Generator(32, config.width, 16), 'gen', top/model)
        return gray_levels(gen(noise, torch.from_numpy(labels_by_hand(pairs, config.label_fields))))
    images = np.zeros((len(pairs), 32, 32))
    for group in MODELS_OF_UNUSUAL:
        gen = trained_net(wgan_gp.Generator(32, config.width), 'gen', folder_of(model, top, group))
        mine = of_model(pairs, group)
        if mine.any(): images[mine] = mirrored(gray_levels(gen(noise[np.flatnonzero(mine)])), pairs.side[mine])
    return images

@pytest.mark.parametrize('output', ['samples', 'validation'])
@pytest.mark.parametrize('model', list(TRAIN))
def test_samples_have_the_label_the_view_and_the_side_of_their_pair(model, output, unusual):
    "Images of right elbows are mirrored back by the WGAN-GP, which is trained with left ones"
    top,_ = unusual
    is_validation = gan.validation_mask(MANY, .25).values
    pairs = TEST if output=='samples' else MANY[is_validation]
    assert set(pairs.side)=={'L', 'R'} and len(pairs)>4
    folder = top/model/output/f'{UNUSUAL[model].epochs:04d}'
    images = np.stack([read_image(folder/f'{name}.png').astype(float) for name in pairs.pair])
    assert sorted(p.stem for p in folder.iterdir())==sorted(pairs.pair)
    difference = abs(images-expected_samples(model, top, pairs))
    assert difference.max()<=1 and difference.mean()<.01        # a rounded gray level may differ

@pytest.mark.parametrize('model', ['ac_gan', 'tac_gan'])
def test_a_checkpoint_knows_the_order_of_its_label_fields(model, unusual):
    "Here the view comes first, in the label and in what `sample_checkpoint` takes"
    top,_ = unusual
    gen = trained_net(ac_gan.Generator(32, 1/8, 16), 'gen', top/model)
    noise = torch.from_numpy(np.random.default_rng(7).standard_normal((6, 256), dtype=np.float32))
    images = sample_checkpoint(top/model, TEST[['view', 'pathology']][:6].to_numpy().tolist(), seed=7, device='cpu')
    expected = gray_levels(gen(noise, torch.from_numpy(labels_by_hand(TEST[:6], ('view', 'pathology')))))
    assert abs(images-expected).max()<=1

def nearest_distances(images, train_images):
    differences = images[:, None].astype(float)-train_images[None]
    return np.sqrt((differences**2).mean((2, 3))).min(1)

@pytest.mark.parametrize('model', list(TRAIN))
def test_metrics_of_a_checkpoint_are_of_validation_images_and_of_their_labels(model, unusual):
    top,_ = unusual
    config = UNUSUAL[model]
    is_validation = gan.validation_mask(MANY, .25).values
    images = MANY_IMAGES
    if model=='wgan_gp':
        images = mirrored(MANY_IMAGES, MANY.side)
        mine = of_model(MANY, MODELS_OF_UNUSUAL[0])
    else: mine = np.ones(len(MANY), bool)
    train,validation = mine & ~is_validation, mine & is_validation
    metrics = pd.read_json(folder_of(model, top)/'checkpoint_metrics.jsonl', lines=True).iloc[-1]
    assert metrics.nn_distance_real==pytest.approx(nearest_distances(images[validation], images[train]).mean(), rel=1e-4)
    assert metrics.epoch==config.epochs
    if model=='wgan_gp': return
    gen = trained_net(ac_gan.Generator(32, config.width, 16), 'gen', top/model)
    dis = trained_net(ac_gan.Discriminator(32, config.width, 16), 'dis', top/model)
    labels,validation_labels = (torch.from_numpy(labels_by_hand(MANY[k], ('view', 'pathology'))) for k in (train, validation))
    def view_hits(x, labels): return float((dis(x)[1][:, :2].argmax(1)==labels[:, :2].argmax(1)).float().mean())
    noise = noise_by_hand([str(i) for i in range(train.sum())], 0)
    fake = scaled(gray_levels(gen(noise, labels)).astype(np.uint8))
    real,held_out = scaled(images[train]), scaled(images[validation])
    expected = {'d_acc_real': float((dis(real)[0]>0).float().mean()), 'd_acc_fake': float((dis(fake)[0]<=0).float().mean()),
                'class_acc_real': view_hits(real, labels), 'class_acc_fake': view_hits(fake, labels),
                'class_acc_val': view_hits(held_out, validation_labels)}
    assert metrics[list(expected)].to_dict()==pytest.approx(expected, abs=1e-5)

# Runs that stop

# The smallest training with two checkpoints after epoch 0, and a step between them
QUICK = dict(width=1/32, device='cpu', log_every=2, epochs=3, checkpoint_every=2, batch_size=6)
QUICK_OPTIONS = {'wgan_gp': {'n_critic': 1, 'max_models': 2, 'validation_fraction': .3}, 'ac_gan': {}, 'tac_gan': {}}

def train_quickly(model, out, **settings):
    "The conditional models with images of side 16"
    if model=='wgan_gp': pairs,images = MANY[:12], MANY_IMAGES[:12]
    else: pairs,images = MANY[:8], MANY_IMAGES[:8, ::2, ::2]
    TRAIN[model][0](images, pairs, TEST[:4], out, **QUICK | QUICK_OPTIONS[model] | settings)

def train_all_quickly(out):
    for model in TRAIN: train_quickly(model, out/model)

def check_kills(folder, n_kills, seed=0):
    differing = run_with_kills('test_gans:train_all_quickly', folder, n_kills, seed)
    assert len(differing)==n_kills
    assert not any(differing.values()), {k: v for k,v in differing.items() if v}

@pytest.mark.long('killed processes, 15 s')
def test_runs_killed_at_file_operations_end_with_the_same_files(tmp_path): check_kills(tmp_path, 4)

@pytest.mark.long('kills')
def test_many_kills(tmp_path): check_kills(tmp_path, N_KILLS, seed=1)

class Killed(BaseException): "Instead of a signal, in the same process"

@pytest.mark.parametrize('function', ['save_samples', 'write_png', 'log_checkpoint_metrics', 'save_checkpoint'])
@pytest.mark.parametrize('model', ['wgan_gp', 'ac_gan'])
def test_a_kill_at_epoch_0_loses_nothing(model, function, tmp_path, monkeypatch):
    "After the samples, in the grid, before the record and before the first checkpoint"
    train_quickly(model, tmp_path/'undisturbed', epochs=0)
    def killed(*args, **options): raise Killed
    module = gan if function in ('write_png', 'save_checkpoint') else {'wgan_gp': wgan_gp, 'ac_gan': ac_gan}[model]
    with monkeypatch.context() as patch:
        patch.setattr(module, function, killed)
        with pytest.raises(Killed): train_quickly(model, tmp_path/'killed', epochs=0)
    train_quickly(model, tmp_path/'killed', epochs=0)
    assert differing_files(tmp_path/'undisturbed', tmp_path/'killed')==[]
    assert list((tmp_path/'killed').glob('**/sample_grids/0000.png'))
    assert len(next((tmp_path/'killed').glob('**/checkpoint_metrics.jsonl')).read_text().splitlines())==1

@pytest.fixture(scope='module')
def short_and_long(tmp_path_factory):
    "Each model trained for two epochs, and for four"
    top = tmp_path_factory.mktemp('lengths')
    for model in TRAIN:
        for epochs in (2, 4): train_quickly(model, top/f'{model}-{epochs}', epochs=epochs, batch_size=2)
    return top

def continued(model, short_and_long, out, prepare=None, **settings):
    "Copy the training of two epochs, change something in its folder, and train for four"
    shutil.copytree(short_and_long/f'{model}-2', out)
    if prepare: prepare(out)
    train_quickly(model, out, **{'epochs': 4, 'batch_size': 2} | settings)

HARMLESS = {
    'checkpoint_every': 3, 'log_every': 1, 'tensorboard': True, 'max_minutes': 60., 'n_parallel': 2,
    'max_models': 1, 'min_images': 2}

@pytest.mark.parametrize('model', list(TRAIN))
def test_harmless_changes_resume_and_others_start_anew(model, short_and_long, tmp_path, capsys):
    changes = {k: v for k,v in HARMLESS.items() if hasattr(UNUSUAL[model], k)}
    continued(model, short_and_long, tmp_path/'out', **changes)
    said = capsys.readouterr().out
    n_models = 1
    resumed = re.findall(r'^(\S+): resumes at step (\d+) of (\d+), epoch 2$', said, re.M)
    assert len(resumed)==n_models and int(resumed[0][2])==2*int(resumed[0][1]), said
    expected = short_and_long/f'{model}-4'
    for file in (tmp_path/'out').glob('**/checkpoint.safetensors'):
        ours,theirs = load_file(file), load_file(expected/file.relative_to(tmp_path/'out'))
        compared = [k for k in ours if k.startswith(('gen/', 'critic/', 'dis/', 'twin/'))]
        if model=='wgan_gp' and file.parent.name!=resumed[0][0]: continue        # not trained on
        assert all(torch.equal(ours[k], theirs[k]) for k in compared)
    train_quickly(model, tmp_path/'out', epochs=4, batch_size=2, **changes)
    assert re.search(rf'^{resumed[0][0]}: all {resumed[0][2]} steps are done$', capsys.readouterr().out, re.M)
    rate = {'lr': 3e-4} if model=='wgan_gp' else {'lr_d': 3e-4}
    train_quickly(model, tmp_path/'out', epochs=1, batch_size=2, **rate)
    said = capsys.readouterr().out
    assert re.search(r'starts at step 0 of \d+ \(lr was .*, is .*3e-04|starts at step 0 of \d+ \(lr was .*0.0003', said), said
    assert list(tmp_path.glob('**/*-previous-1'))

def test_merged_samples_are_of_the_epoch_they_are_under(short_and_long, tmp_path, capsys):
    "With another interval the epochs of before are missing in some models, and not replaced by later ones"
    continued('wgan_gp', short_and_long, tmp_path/'out', checkpoint_every=1)
    out = tmp_path/'out'
    assert sorted(p.name for p in (out/'samples').iterdir())==['0000', '0002', '0003', '0004']
    assert 'samples of epochs 1 are left out' in capsys.readouterr().out
    for file in (out/'samples').glob('*/*.png'):
        source, = out.glob(f'*__*/samples/{file.parent.name}/{file.name}')
        assert file.read_bytes()==source.read_bytes()

def cut(path): path.write_bytes(path.read_bytes()[:len(path.read_bytes())//2])
def empty(path): path.write_bytes(b'')
def spoil_header(path): path.write_bytes(path.read_bytes()[:8]+b'?'*40+path.read_bytes()[48:])
def flip_a_weight(path):
    data = bytearray(path.read_bytes())
    data[-5] ^= 64
    path.write_bytes(data)

@pytest.mark.parametrize('model,damage', [('ac_gan', cut), ('ac_gan', empty), ('ac_gan', spoil_header), ('ac_gan', flip_a_weight),
                                          ('tac_gan', flip_a_weight), ('wgan_gp', flip_a_weight)])
def test_a_damaged_checkpoint_is_replaced_by_the_one_before(model, damage, short_and_long, tmp_path, capsys):
    def prepare(out): damage(next(out.glob('**/checkpoint.safetensors')))
    continued(model, short_and_long, tmp_path/'out', prepare)
    said = capsys.readouterr().out
    assert 'checkpoint.safetensors is damaged' in said and 'the checkpoint before it, of step 0, is used' in said
    ignored = ('rng/cpu',) if model=='wgan_gp' else ()
    assert differing_files(short_and_long/f'{model}-4', tmp_path/'out', ignored)==[]

@pytest.mark.parametrize('model', ['ac_gan', 'wgan_gp'])
def test_two_damaged_checkpoints_are_named(model, short_and_long, tmp_path):
    def prepare(out):
        checkpoint = next(out.glob('**/checkpoint.safetensors'))
        cut(checkpoint)
        empty(previous_checkpoint(checkpoint))
    with pytest.raises(DamagedFile, match='checkpoint.safetensors is damaged.*checkpoint-previous.safetensors is damaged.*fix:'):
        continued(model, short_and_long, tmp_path/'out', prepare)
    assert len(list((tmp_path/'out').glob('**/checkpoint*.safetensors')))>=2

@pytest.mark.parametrize('model', list(TRAIN))
def test_a_second_training_in_a_folder_is_refused(model, short_and_long, tmp_path):
    shutil.copytree(short_and_long/f'{model}-2', tmp_path/'out')
    with lock_training(tmp_path/'out'):
        with pytest.raises(RuntimeError, match='is training in .*fix: wait'):
            train_quickly(model, tmp_path/'out', epochs=4, batch_size=2)
    assert differing_files(short_and_long/f'{model}-2', tmp_path/'out')==[]

@pytest.mark.parametrize('model', list(TRAIN))
def test_leftovers_of_a_kill_are_removed(model, short_and_long, tmp_path):
    def prepare(out):
        folder = next(out.glob('**/checkpoint.safetensors')).parent
        for name in ('.part-checkpoint.safetensors', 'diverged.json', 'sample_grids/.part-0009.png'): (folder/name).write_text('x')
        for output in ('samples', 'validation'):
            (folder/output/'.0009').mkdir(parents=True)
            (folder/output/'.0009'/'a.png').write_text('x')
    continued(model, short_and_long, tmp_path/'out', prepare)
    left = [p for p in (tmp_path/'out').rglob('*') if p.name.startswith('.') or p.name=='diverged.json']
    assert left==[] and not list(tmp_path.glob('.*'))

@pytest.mark.parametrize('model', ['ac_gan', 'wgan_gp'])
def test_a_weight_that_is_not_finite_reaches_no_file(model, short_and_long, tmp_path, monkeypatch, capsys):
    "Losses are finite, and the weights after the last step are not"
    module,name = (wgan_gp, 'wgan_step') if model=='wgan_gp' else (ac_gan, 'conditional_gan_step')
    step_fn = getattr(module, name)
    calls = []
    def spoils_weights(*args):
        terms = step_fn(*args)
        calls.append(args)
        if len(calls)==3:
            net = args[0] if model=='wgan_gp' else args[0][0]
            with torch.no_grad(): next(net.parameters()).flatten()[0] = torch.nan
        return {k: torch.ones_like(v) for k,v in terms.items()}
    with monkeypatch.context() as patch:
        patch.setattr(module, name, spoils_weights)
        with pytest.raises(TrainingDiverged, match='a weight is NaN or infinite.*resumes from step'):
            continued(model, short_and_long, tmp_path/'out')
    file, = (tmp_path/'out').glob('**/diverged.json')
    assert not (file.parent/'samples'/'0004').exists()
    for checkpoint in file.parent.glob('checkpoint*.safetensors'):
        assert all(v.isfinite().all() for v in load_file(checkpoint).values() if v.is_floating_point())
    train_quickly(model, tmp_path/'out', epochs=4, batch_size=2)
    ignored = ('rng/cpu',) if model=='wgan_gp' else ()
    assert differing_files(short_and_long/f'{model}-4', tmp_path/'out', ignored)==[]

@pytest.mark.parametrize('model', list(TRAIN))
def test_divergence_stops_a_run(model, tmp_path):
    train,options = TRAIN[model]
    rates = {'lr': 1e30} if model=='wgan_gp' else {'lr_g': 1e30, 'lr_d': 1e30}
    with pytest.raises(TrainingDiverged, match='training diverged at step'):
        train(IMAGES, PAIRS, PAIRS, tmp_path/'x', epochs=20, checkpoint_every=5, **SMALL, **rates, **options)
    file, = (tmp_path/'x').glob('**/diverged.json')
    diverged = json.loads(file.read_text())
    restored = load_file(file.with_name('checkpoint.safetensors'))
    n = 2 if model=='wgan_gp' else len(IMAGES)
    assert diverged['batch_indices']==list(batch_indices(n, 5, 20))[diverged['step']-1].tolist()
    assert diverged['seed']==0
    assert all(t.isfinite().all() for t in restored.values() if t.is_floating_point())
    inputs = {'n': 2} if model=='wgan_gp' else {'labels': [('normal', 'AP', 'L')]*2}
    assert sample_checkpoint(file.parent, **inputs, device='cpu').shape==(2, 32, 32)

@pytest.mark.parametrize('model', list(TRAIN))
def test_an_image_for_each_test_and_validation_pair(model, tmp_path):
    train,options = TRAIN[model]
    pairs = pd.concat([PAIRS.assign(pair=PAIRS.pair+k, patient=PAIRS.patient+k) for k in 'abc'], ignore_index=True)
    is_validation = gan.validation_mask(pairs, .2)
    if model=='wgan_gp': options = options | {'max_models': 28}
    out = tmp_path/'x'
    train(IMAGES.repeat(3, 0), pairs, PAIRS, out, epochs=1, checkpoint_every=1, validation_fraction=.2, **SMALL, **options)
    samples,validation = ({p.stem for p in (out/output/'0001').iterdir()} for output in ('samples', 'validation'))
    uncovered = set(pd.read_csv(out/'uncovered_pairs.csv').pair) if model=='wgan_gp' else set()
    assert samples|uncovered==set(PAIRS.pair) and not samples&uncovered
    assert validation==set(pairs.pair[is_validation])
    metrics = pd.read_json(next(out.glob('**/checkpoint_metrics.jsonl')), lines=True)
    assert {'intra_class_ms_ssim_fake', 'intra_class_ms_ssim_real', 'nn_distance_fake', 'nn_distance_real', 'collapse_flag'}<=set(metrics)
    assert model=='wgan_gp' or metrics.class_acc_val.notna().all()

def test_models_that_cannot_be_trained_are_listed(tmp_path):
    "Most of 28 models have no images here, one has two: each is listed with its reason, and each test pair has an image or is listed"
    more = PAIRS[:2].assign(pair=['g0__x', 'g1__x'], pathology='olecranon fracture')
    test = pd.concat([PAIRS, more], ignore_index=True)
    out = tmp_path/'x'
    models = wgan_gp.train_wgan_gp(IMAGES, PAIRS, test, out, epochs=1, checkpoint_every=1, max_models=3, n_critic=1, **SMALL)
    uncovered = pd.read_csv(out/'uncovered_pairs.csv')
    generated = {p.stem for p in (out/'samples'/'0001').iterdir()}
    assert len(models)==28 and models.n_test.sum()==len(test)
    assert len(uncovered)+len(generated)==len(test) and not set(uncovered.pair)&generated
    assert set(uncovered.reason)=={'no training images', 'not among the 3 largest'}
    assert (models[models.trained=='yes'].reason=='fewer images than a batch of 5: repeated within it').all()

# The benchmark

@pytest.mark.long('a benchmark, 20 s')
def test_benchmark_runs(tmp_path):
    command = [sys.executable, str(ROOT/'bench'/'gans.py'), '--quick', '--models', 'wgan_gp', '--device', 'cpu', '--out', str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=170)
    assert done.returncode==0, done.stderr
    results, = (json.loads(p.read_text()) for p in tmp_path.glob('*.json'))
    assert [(row['model'], row['variant']) for row in results['rows']]==[('wgan_gp', 'reference'), ('wgan_gp', 'elbowsynth')]
    assert all(row['ms']>0 and row['peak_mib']>0 for row in results['rows'])
    assert 'Nothing here was measured on a GPU' in next(tmp_path.glob('*.md')).read_text()

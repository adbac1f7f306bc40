"The inpainting models: Table 7, recipes, what a kill costs, what is saved, and what others can load"
import inspect, json, os, signal, subprocess, sys, time
import numpy as np, pandas as pd, pytest, torch
from safetensors.torch import load_file
from conftest import ROOT
from elbowsynth.data.images import read_image
from elbowsynth.diffusion.flux import load_flux, sample_flux, train_flux
from elbowsynth.diffusion.latents import InpaintDataset, toy_data, write_onetrainer_folder
from elbowsynth.diffusion.settings import build_parser, RECIPES, resolve_config, unused_table7_rows
from elbowsynth.diffusion.sampling import composite
from elbowsynth.diffusion.finetune import train_cli
from elbowsynth.diffusion.sdxl import load_sdxl, sample_sdxl, tiny_sdxl, train_sdxl

TOY = toy_data(6, 32)
FEW = InpaintDataset(*(o[:2] for o in TOY))
QUICK = dict(every=1, boost_epochs=0, epochs=1, steps=1, recompute=False, device='cpu', lr=1e-3, validate=1)
SDXL, FLUX = dict(QUICK, base='tiny-sdxl-random'), dict(QUICK, base='tiny-flux-random')
paper = lambda train: {p.name: p.default for p in inspect.signature(train).parameters.values() if p.default is not p.empty}
state = lambda out, name='checkpoint': load_file(out/f'{name}.safetensors')

def alike(a, b):
    "Whether two runs came to the same weights, moments and films"
    films = lambda o: {p.relative_to(o): p.read_bytes() for k in ('samples', 'raw') for p in sorted((o/k).rglob('*.png'))}
    one, two = state(a), state(b)
    drop = lambda d: {k: v for k, v in d.items() if not k.startswith('random/')}
    return drop(one).keys()==drop(two).keys() and all(torch.equal(one[k], two[k]) for k in drop(one)) and films(a)==films(b)

# ---- Table 7

COMMON = dict(epochs=200, lr=1e-5, boost_lr=1e-4, boost_epochs=20, every=20, batch=4, optimizer='adafactor', scale_parameter=False, relative_step=False, warmup_init=False, fused_back_pass=False,
              decay_rate=-.8, text_lr=3e-6, text_epochs=200, ema=0., train_net=True, net_epochs=200, unmasked_probability=.1, unmasked_weight=.4, normalize=False, loss_weight='constant', gamma=5.,
              loss_scaler='none', scheduler='constant', vae_dtype='float32', recipe='corrected', text_encoder='trained', text_encoder_2='trained', lora_rank=0)

@pytest.mark.parametrize('train,dtype,rounding', [(train_sdxl, 'float32', False), (train_flux, 'bfloat16', True)])
def test_table_7_is_the_default(train, dtype, rounding):
    has = paper(train)
    assert {k: has[k] for k in COMMON}==COMMON and has['stochastic_rounding']==rounding
    o = resolve_config(has, has)
    assert {o[k] for k in ('dtype', 'prior_dtype', 'text_dtype', 'train_dtype', 'output_dtype')}=={dtype}
    assert unused_table7_rows(has)==['gamma', 'warmup_init']
    assert set(unused_table7_rows(has | dict(recipe='onetrainer-2025')))=={'gamma', 'warmup_init', 'unmasked_weight'} | ({'stochastic_rounding'} if rounding else set())

@pytest.mark.parametrize('module,stage', [('sdxl', '21_sdxl'), ('flux', '22_flux')])
def test_the_stage_has_the_trainers_defaults(module, stage):
    from elbowsynth.stages import read_parameters
    trainer, cell = paper({'sdxl': train_sdxl, 'flux': train_flux}[module]), read_parameters(ROOT/'nbs'/f'{stage}.ipynb')
    assert set(trainer)-{'limit'}<=set(cell) and {k: cell[k] for k in trainer if k!='limit'}=={k: v for k, v in trainer.items() if k!='limit'} and cell['size']==1024

def test_flux_is_told_the_same_guidance_at_both_ends():
    has = paper(train_flux)
    told = [{k: resolve_config(has | dict(recipe=r), has)[k] for k in ('guidance', 't5_length')} for r in RECIPES]
    assert told==[{'guidance': 30, 't5_length': 512}, {'guidance': 1, 't5_length': 77}]
    assert resolve_config(paper(train_sdxl), paper(train_sdxl))['guidance']==7.5

USELESS = [dict(gamma=1.), dict(stochastic_rounding=True), dict(warmup_init=True), dict(train_dtype='float64'), dict(text_encoder='frozen', text_encoder_2='frozen', text_lr=1e-4),
           dict(train_net=False, net_epochs=3), dict(optimizer='adamw', decay_rate=-.5), dict(recipe='onetrainer-2025', unmasked_weight=1.), dict(shard=True), dict(relative_step=True, lr=1e-3),
           dict(recipe='onetrainer-2025', stochastic_rounding=True, dtype='bfloat16'), dict(optimizer='adamw', stochastic_rounding=True, dtype='bfloat16'),
           dict(normalize=True, unmasked_weight=1.), dict(lora_rank=4, output_dtype='bfloat16'), dict(relative_step=True, boost_lr=1e-3)]

@pytest.mark.parametrize('options', USELESS, ids=lambda o: '-'.join(o))
def test_an_option_without_effect_is_an_error(options):
    has = paper(train_sdxl)
    with pytest.raises(ValueError, match='has no effect|shard'): resolve_config(has | options, has)

def test_the_same_options_may_be_useful():
    has = paper(train_sdxl)
    for useful in (dict(gamma=1., loss_weight='min-snr'), dict(stochastic_rounding=True, dtype='bfloat16'), dict(warmup_init=True, relative_step=True),
                   dict(recipe='onetrainer-2025', unmasked_weight=.5, normalize=True)): resolve_config(has | useful, has)

# ---- what a kill costs

SCRIPT = '''
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[3])
import test_diffusion as t
kind, out = sys.argv[1:3]
{'sdxl': t.train_sdxl, 'flux': t.train_flux}[kind](t.TOY, t.FEW, Path(out), **t.LONG[kind])
'''
LONG = {'sdxl': dict(SDXL, epochs=3, boost_epochs=1, every=2, flip=.5, shift=8), 'flux': dict(FLUX, epochs=3, boost_epochs=1, every=2)}

@pytest.mark.parametrize('kind', ['sdxl', 'flux'])
def test_killed_runs_end_as_whole_ones(kind, tmp_path):
    "kill -9 while it trains, then while it draws; the run that goes on ends in the same bits, with random rounding, mirrored films and dropout"
    train, out = {'sdxl': train_sdxl, 'flux': train_flux}[kind], tmp_path/kind
    train(TOY, FEW, tmp_path/'whole', **LONG[kind])
    p = subprocess.Popen([sys.executable, '-c', SCRIPT, kind, str(out), str(ROOT/'tests')], env=os.environ | {'PYTHONPATH': str(ROOT)})
    log, end = out/'log.jsonl', time.time()+200
    while p.poll() is None and time.time()<end and not (log.exists() and len(log.read_text().splitlines())>=2): time.sleep(.002)
    p.send_signal(signal.SIGKILL)
    p.wait()
    assert not (out/'boosted.safetensors').exists()
    module = sys.modules[f'elbowsynth.{kind}']
    drawing = getattr(module, f'sample_{kind}')
    def once(pipe, images, masks, captions, names, *a, **k):       # the first film of the epoch is drawn, then it dies
        drawing(pipe, images[:1], masks[:1], captions[:1], names[:1], *a, **k)
        raise KeyboardInterrupt
    setattr(module, f'sample_{kind}', once)
    try:
        with pytest.raises(KeyboardInterrupt): train(TOY, FEW, out, **LONG[kind])
    finally: setattr(module, f'sample_{kind}', drawing)
    train(TOY, FEW, out, **LONG[kind])
    assert alike(tmp_path/'whole', out)
    steps = pd.read_json(log, lines=True)
    assert steps.step.tolist()==[*range(1, len(steps)+1)] and pd.read_json(out/'validation.jsonl', lines=True).step.is_unique

def test_the_cache_changes_nothing(tmp_path):
    for cache in (True, False): train_sdxl(TOY, FEW, tmp_path/str(cache)/'out', cache_latents=cache, flip_probability=.5, **SDXL)
    assert alike(tmp_path/'True'/'out', tmp_path/'False'/'out')
    kept = sorted((tmp_path/'True'/'latents').glob('*.safetensors'))
    assert kept and not (tmp_path/'False'/'latents').exists()
    times = [p.stat().st_mtime_ns for p in kept]
    train_sdxl(TOY, FEW, tmp_path/'True'/'again', flip_probability=.5, **SDXL)   # another run beside it encodes nothing
    assert [p.stat().st_mtime_ns for p in kept]==times and alike(tmp_path/'True'/'out', tmp_path/'True'/'again')

def test_a_weight_may_be_updated_as_soon_as_its_gradient_is_there(tmp_path):
    for fused in (False, True): train_sdxl(TOY, FEW, tmp_path/str(fused), fused_back_pass=fused, **SDXL)
    assert alike(tmp_path/'False', tmp_path/'True')

# ---- what learns, and what is saved

def moved_nets(out, base): return {k.split('/')[0] for k, v in state(out).items() if '/' in k and k.split('/')[0] in base and not torch.equal(v, base[k.split('/')[0]].state_dict()[k.split('/', 1)[1]].to(v))}

@pytest.mark.parametrize('options,learnt', [(dict(text_encoder='frozen', text_encoder_2='offloaded'), {'unet'}), (dict(train_net=False, lr=1e-5), {'text_encoder', 'text_encoder_2'}),
                                            (dict(optimizer='adamw', text_encoder='frozen'), {'unet', 'text_encoder_2'})])
def test_what_is_frozen_stays(options, learnt, tmp_path):
    train_sdxl(TOY, FEW, tmp_path/'out', **SDXL | options | (dict(text_lr=1e-3) if learnt!={'unet'} else {}))
    base = load_sdxl('tiny-sdxl-random')
    assert moved_nets(tmp_path/'out', {k: getattr(base, k) for k in ('unet', 'text_encoder', 'text_encoder_2')})==learnt

def test_frozen_captions_are_read_as_trained_ones_are(tmp_path):
    for k, how in (('free', 'trained'), ('known', 'frozen'), ('away', 'offloaded')): train_sdxl(TOY, FEW, tmp_path/k, text_encoder=how, text_encoder_2=how, **SDXL)
    first = [json.loads((tmp_path/k/'log.jsonl').read_text().splitlines()[0])['loss'] for k in ('free', 'known', 'away')]
    assert first[1]==first[2] and abs(first[0]-first[1])<1e-5 and alike(tmp_path/'known', tmp_path/'away')

@pytest.mark.parametrize('kind', ['sdxl', 'flux'])
def test_saved_models_are_anyones(kind, tmp_path):
    "diffusers' own classes load what was saved, and draw what was drawn"
    import diffusers
    train, sample, quick, cls = {'sdxl': (train_sdxl, sample_sdxl, SDXL, 'StableDiffusionXLInpaintPipeline'), 'flux': (train_flux, sample_flux, FLUX, 'FluxFillPipeline')}[kind]
    train(TOY, FEW, tmp_path/'out', text_lr=1e-2, **quick)
    assert json.loads((tmp_path/'out'/'model'/'model_index.json').read_text())['_class_name']==cls
    pipe = getattr(diffusers, cls).from_pretrained(tmp_path/'out'/'model', torch_dtype=torch.float32 if kind=='sdxl' else torch.bfloat16)
    pipe.set_progress_bar_config(disable=True)
    drawn = sample(pipe, *FEW[1:], FEW.names, steps=1)
    assert np.array_equal(drawn[0], read_image(tmp_path/'out'/'raw'/'0001'/'film0.png'))
    assert np.array_equal(composite(FEW.images, drawn, FEW.masks)[1], read_image(tmp_path/'out'/'samples'/'0001'/'film1.png'))
    base = {'sdxl': load_sdxl, 'flux': load_flux}[kind](quick['base'])
    assert any(not torch.equal(a.float(), b.float()) for a, b in zip(pipe.text_encoder_2.parameters(), base.text_encoder_2.parameters()))

@pytest.mark.parametrize('kind', ['sdxl', 'flux'])
def test_adapters_load_in_diffusers(kind, tmp_path):
    train, sample, load, quick = {'sdxl': (train_sdxl, sample_sdxl, load_sdxl, SDXL), 'flux': (train_flux, sample_flux, load_flux, FLUX)}[kind]
    quick = dict(quick, lora_rank=2, text_lr=1e-2) | (dict(text_encoder_2='frozen') if kind=='flux' else {})
    train(TOY, FEW, tmp_path/'out', **quick | dict(lr=1e-2, epochs=2))
    pipe = load(quick['base'])
    plain = sample(pipe, *FEW[1:], FEW.names, steps=1)
    pipe.load_lora_weights(tmp_path/'out'/'model')
    drawn = sample(pipe, *FEW[1:], FEW.names, steps=1)
    assert np.array_equal(drawn[0], read_image(tmp_path/'out'/'raw'/'0002'/'film0.png')) and not np.array_equal(drawn, plain)
    assert all('lora' in k for k in state(tmp_path/'out') if k.startswith(('unet', 'transformer', 'text')))
    if kind=='flux':
        with pytest.raises(ValueError, match='no adapters of T5'): train(TOY, FEW, tmp_path/'t5', **quick | dict(text_encoder_2='trained'))

def test_the_saved_model_may_have_another_type(tmp_path):
    train_sdxl(TOY, FEW, tmp_path/'out', output_dtype='bfloat16', **SDXL)
    saved, kept = load_file(tmp_path/'out'/'model'/'unet'/'diffusion_pytorch_model.safetensors'), state(tmp_path/'out')
    assert {v.dtype for v in saved.values()}=={torch.bfloat16} and all(torch.equal(v, kept[f'unet/{k}'].bfloat16()) for k, v in saved.items())

def test_nothing_hangs_on_cells_of_eight_pixels(tmp_path):
    from diffusers import AutoencoderKL
    pipe = tiny_sdxl()
    vae = AutoencoderKL(latent_channels=4, block_out_channels=(4, 8, 8), norm_num_groups=4, down_block_types=['DownEncoderBlock2D']*3, up_block_types=['UpDecoderBlock2D']*3, force_upcast=False)
    type(pipe)(**{**pipe.components, 'vae': vae}, add_watermarker=False).save_pretrained(tmp_path/'four')
    assert load_sdxl(str(tmp_path/'four')).vae_scale_factor==4
    train_sdxl(TOY, FEW, tmp_path/'out', **dict(SDXL, base=str(tmp_path/'four')))
    assert len(list((tmp_path/'out'/'samples'/'0001').glob('*.png')))==2

# ---- from the outside

def test_a_folder_of_another_tools_user_is_enough(tmp_path):
    write_onetrainer_folder(tmp_path/'films', TOY)
    out = train_cli(train_sdxl, 'elbowsynth.diffusion.sdxl', ['--films', str(tmp_path/'films'), '--out', str(tmp_path/'out'), '--base', 'tiny-sdxl-random', '--size', '32', '--epochs', '1', '--every', '1',
                     '--boost_epochs', '0', '--steps', '1', '--recompute', 'false', '--device', 'cpu', '--lr', '1e-3', '--validate', '1'])
    train_sdxl(TOY, TOY, tmp_path/'direct', **SDXL)
    assert alike(tmp_path/'direct', tmp_path/'out') and {p.stem for p in (tmp_path/'out'/'samples'/'0001').glob('*.png')}==set(TOY.names)
    with pytest.raises(SystemExit, match='give either --films'): train_cli(train_sdxl, 'elbowsynth.diffusion.sdxl', ['--out', 'x'])
    assert set(paper(train_flux))<=set(vars(build_parser(train_flux, 'x').parse_args(['--out', 'x'])))

def test_the_log_says_what_it_should(tmp_path):
    train_sdxl(TOY, FEW, tmp_path/'out', **dict(SDXL, unmasked_probability=.5, epochs=4))
    log, judged = (pd.read_json(tmp_path/'out'/f'{k}.jsonl', lines=True) for k in ('log', 'validation'))
    assert {'loss', 'inside', 'outside', 'area', 'wholly', 'gradient', 'lr', 'text_lr', 'seconds', 'left'}<=set(log.columns)
    assert 0<log.wholly.mean()<1 and (log.gradient>0).all() and log.left.iloc[-1]==0
    assert judged.epoch.tolist()[0]==0 and {'at_100', 'at_900', 'inside'}<=set(judged.columns) and np.isfinite(judged.inside).all()

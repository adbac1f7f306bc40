"The small base models: architecture, loading by diffusers, scores of the model cards, patients"
import json, os, shutil
import numpy as np, pandas as pd, pytest, torch
from safetensors import safe_open
from conftest import ROOT
from elbowsynth.data.classes import caption, PATHOLOGIES, VIEWS
from elbowsynth.diffusion import pretraining
from elbowsynth.diffusion.pretraining import (
    bundled_model, bundled_models_dir, encode, file_manifest, held_out_data, inpaint_with, main,
    masked_ssim, normal_image, PATIENT_SEEDS, pretrain, random_masks, scale_latents,
    sharpness_ratio, summary_table)
from elbowsynth.diffusion.sampling import composite
from elbowsynth.diffusion.small_models import BUILDERS, component_sizes
from elbowsynth.evaluation.baselines import telea_inpaint, vae_reconstruct
from elbowsynth.phantom.phantom import phantom, phantom_dataset_plan
from elbowsynth.stages import profile_values, stages
from elbowsynth.training import load_checkpoint, lr_factor, TrainingDiverged

NAMES = list(BUILDERS)
MANIFEST = json.loads((bundled_models_dir()/'manifest.json').read_text())
SCORES = pd.read_csv(bundled_models_dir()/'held_out.csv')

@pytest.fixture(scope='module')
def pipelines():
    from diffusers import FluxFillPipeline, StableDiffusionXLInpaintPipeline
    classes = {'tiny-sdxl': StableDiffusionXLInpaintPipeline, 'tiny-flux': FluxFillPipeline}
    loaded = {}
    for name in NAMES:
        loaded[name] = classes[name].from_pretrained(bundled_model(name), use_safetensors=True,
                                                     local_files_only=True)
        loaded[name].set_progress_bar_config(disable=True)
    return loaded

def test_files_match_the_manifest_are_small_and_safe():
    files = MANIFEST['files']
    assert file_manifest(bundled_models_dir())==files
    others = [p for p in bundled_models_dir().iterdir() if p.is_file()]
    assert {p.name for p in others}=={'manifest.json', 'held_out.csv', 'training_curves.csv'}
    model_bytes = sum(size for size,_ in files.values())
    assert model_bytes+sum(p.stat().st_size for p in others)<=15e6
    suffixes = {path.rsplit('.', 1)[1] for path in files}
    assert suffixes<={'safetensors', 'json', 'txt', 'md', 'model'}
    for name in NAMES:
        parts = [path.split('/') for path in files if path.startswith(name+'/')]
        folders = {p[1] for p in parts if len(p)>2}
        assert folders>={'vae', 'text_encoder', 'text_encoder_2', 'tokenizer', 'tokenizer_2',
                         'scheduler'}
    for path in bundled_models_dir().rglob('*.safetensors'):
        with safe_open(path, 'pt') as f:
            assert all(f.get_tensor(k).isfinite().all() for k in f.keys())

def test_manifest_detects_a_changed_byte(tmp_path):
    shutil.copytree(bundled_models_dir(), tmp_path/'tiny')
    card = tmp_path/'tiny'/'tiny-sdxl'/'README.md'
    card.write_bytes(card.read_bytes()+b' ')
    changed = [k for k,v in file_manifest(tmp_path/'tiny').items() if v!=MANIFEST['files'][k]]
    assert changed==['tiny-sdxl/README.md']

@pytest.mark.parametrize('name', NAMES)
def test_architecture_is_that_of_the_published_model(pipelines, name):
    pipe, untrained = pipelines[name], BUILDERS[name]()
    assert component_sizes(pipe)==MANIFEST['n_parameters'][name]==component_sizes(untrained)
    assert 1e6<=sum(component_sizes(pipe).values())<=3.5e6
    assert pipe.vae_scale_factor==8
    latent_channels = pipe.vae.config.latent_channels
    if name=='tiny-sdxl':
        config = pipe.unet.config
        assert (config.in_channels, config.out_channels, latent_channels)==(9, 4, 4)
        assert config.addition_embed_type=='text_time'
    else:
        config = pipe.transformer.config
        assert (config.in_channels, config.out_channels, latent_channels)==(384, 64, 16)
        assert config.guidance_embeds is True
    for encoder in ('text_encoder', 'text_encoder_2'):                # not trained
        weights = getattr(pipe, encoder).state_dict().values()
        initial = getattr(untrained, encoder).state_dict().values()
        assert all(torch.equal(a, b) for a,b in zip(weights, initial))

@pytest.mark.parametrize('name', NAMES)
def test_all_captions_have_different_embeddings(pipelines, name):
    pipe, captions = pipelines[name], [caption(v, [p]) for v in VIEWS for p in PATHOLOGIES]
    for tokenizer in (pipe.tokenizer, pipe.tokenizer_2):
        ids = tokenizer(captions).input_ids
        assert len({tuple(i) for i in ids})==28
        assert max(map(len, ids))<=tokenizer.model_max_length
        if tokenizer.unk_token_id not in (tokenizer.eos_token_id, tokenizer.pad_token_id):
            assert not any(tokenizer.unk_token_id in i for i in ids)
    if name=='tiny-flux':
        encoded = pipe.encode_prompt(captions, None, 'cpu', max_sequence_length=24)
    else: encoded = pipe.encode_prompt(captions, device='cpu', do_classifier_free_guidance=False)
    embeddings = encoded[0].flatten(1)[None]
    distances = torch.cdist(embeddings, embeddings)[0]
    assert distances[~torch.eye(28, dtype=bool)].min()>.1

@pytest.mark.parametrize('name', NAMES)
def test_latents_are_standardized(pipelines, name):
    vae = pipelines[name].vae
    z = scale_latents(vae, encode(vae, held_out_data(16)[0]))
    assert abs(z.mean())<.1 and .9<z.std()<1.1
    assert z.std((0, 2, 3)).min()>.5 and z.mean((0, 2, 3)).abs().max()<.7

@pytest.mark.parametrize('name, size', [(n, s) for n in NAMES for s in (64, 128, 176)])
def test_diffusers_pipelines_sample_at_several_sizes(pipelines, name, size):
    image, mask = torch.full((1, 3, size, size), .3), torch.zeros(1, 1, size, size)
    mask[..., 16:48, 16:48] = 1
    options = {'max_sequence_length': 24} if name=='tiny-flux' else {'guidance_scale': 1.5}
    samples = []
    for _ in range(2):
        generator = torch.Generator().manual_seed(0)
        output = pipelines[name](
            prompt=caption('AP', ['olecranon fracture']), image=image, mask_image=mask, height=size,
            width=size, num_inference_steps=2, output_type='np', generator=generator, **options)
        samples.append(output.images)
    assert samples[0].shape==(1, size, size, 3) and np.isfinite(samples[0]).all()
    assert np.array_equal(*samples)

def test_models_are_better_than_the_baselines():
    mean = SCORES.groupby('method')[['ssim', 'mae']].mean()
    assert SCORES.image_index.nunique()>=64
    for name in NAMES:
        for baseline in ('telea', 'nearest', 'gray'):
            assert mean.ssim[name]>mean.ssim[baseline], (name, baseline)
        assert mean.ssim[f'{name} autoencoder']>mean.ssim[name]       # an upper bound
        own, telea = (SCORES[SCORES.method==m].ssim.values for m in (name, 'telea'))
        difference = own-telea
        assert difference.mean()-1.96*difference.std()/len(difference)**.5>0

def test_scores_are_reproduced(pipelines):
    images, masks = held_out_data(6)
    nearest = SCORES[SCORES.method=='telea'].nearest_index[:6]
    nearest_images = np.stack([normal_image(i) for i in nearest])
    inpainted = {'telea': telea_inpaint(images, masks),
                 'nearest': composite(images, nearest_images, masks)}
    for name,pipe in pipelines.items():
        reconstructed = vae_reconstruct(images, pipe.vae, batch_size=16)
        inpainted[name] = inpaint_with(pipe, images, masks)
        inpainted[f'{name} autoencoder'] = composite(images, reconstructed, masks)
    for method,result in inpainted.items():
        expected = SCORES[(SCORES.method==method)&(SCORES.image_index<6)]
        assert np.abs(masked_ssim(images, result, masks)-expected.ssim).max()<.02, method
        sharpness = sharpness_ratio(images, result, masks)
        assert np.allclose(sharpness, expected.sharpness, atol=.05, rtol=.1), method

@pytest.mark.parametrize('name', NAMES)
def test_model_card_reports_the_scores(name):
    card, table = (bundled_model(name)/'README.md').read_text(), summary_table(SCORES)
    for method in ('telea', 'nearest', name, f'{name} autoencoder'):
        assert f'| {method} | {" | ".join(table.loc[method])} |' in card
    assert 'license: apache-2.0' in card
    n_millions = sum(MANIFEST['n_parameters'][name].values())/1e6
    assert f'{n_millions:.2f} million' in card
    curves = pd.read_csv(bundled_models_dir()/'training_curves.csv').query('base_model==@name')
    for component,words in (('vae', 'steps of the autoencoder'), ('denoiser', 'of the denoiser')):
        n_steps = curves[curves.component==component].step.max()
        assert f'{n_steps:,} {words}' in card
    val_loss = curves.val_loss.dropna()
    assert val_loss.iloc[-1]<val_loss.iloc[0]

def test_patients_are_not_those_of_a_study():
    known, first = stages(ROOT/'nbs'), min(PATIENT_SEEDS.values())
    defaults = next(s.defaults for s in known if s.name=='phantom')
    profiles = [defaults|profile_values(p.stem, known).get('phantom', {})
                for p in (ROOT/'params').glob('*.yaml')]
    assert len(profiles)>=3
    plans = [phantom_dataset_plan(p['n_patients'], p['seed']) for p in profiles]
    plans.append(phantom_dataset_plan(2000, 10**6))
    for plan in plans: assert max(row['seed'] for row in plan)<first
    starts = sorted(PATIENT_SEEDS.values())
    assert min(np.diff(starts))>10**6                                 # subsets do not overlap

def test_large_seeds_are_not_truncated():
    def image(seed): return phantom('AP', ['normal'], seed=seed, size=48).image
    assert (image(10**15)!=image(0)).mean()>.3
    assert (image(10**15)!=image(10**15%2**32)).mean()>.3

@pytest.mark.long('three pretrainings, 6 s')
def test_interrupted_pretraining_is_bit_identical(tmp_path):
    settings = dict(n_images=6, size=64, vae_steps=1, denoiser_steps=2)
    once, parts = tmp_path/'once', tmp_path/'parts'
    main([str(once), '--base-model', 'tiny-flux', '--n-images', '6', '--size', '64',
          '--vae-steps', '1', '--denoiser-steps', '2'])
    shutil.copytree(once, parts, ignore=shutil.ignore_patterns('tiny-flux'))
    for _ in range(3): pretrain('tiny-flux', parts, max_minutes=1e-6, **settings)
    def weights(out):
        files = (out/'tiny-flux'/'model').rglob('*.safetensors')
        return {p.parent.name: p.read_bytes() for p in files}
    assert weights(once)==weights(parts)
    assert set(weights(once))=={'vae', 'transformer', 'text_encoder', 'text_encoder_2'}
    pretrain('tiny-flux', parts, **settings|{'denoiser_steps': 3})    # extended
    assert load_checkpoint(parts/'tiny-flux'/'denoiser.safetensors', {})['step']==3

def test_masks_of_the_evaluation_are_fixed():
    images, masks = held_out_data(2)
    assert np.array_equal(masks, random_masks(64, 128, 11)[:2]) and images.shape==(2, 128, 128)

def test_learning_rate_starts_above_zero_and_ends_at_zero():
    assert lr_factor(0, 100, 'trapezoid', 100)>0 and lr_factor(100, 100, 'trapezoid', 100)==0

def test_missing_models_are_reported(monkeypatch, tmp_path):
    monkeypatch.setattr(pretraining, 'bundled_models_dir', lambda: tmp_path)
    command = 'python -m elbowsynth.diffusion.pretraining OUT --base-model tiny-flux'
    with pytest.raises(FileNotFoundError, match=command): bundled_model('tiny-flux')
    with pytest.raises(ValueError, match='expected one of tiny-sdxl, tiny-flux'):
        bundled_model('flux')

def test_command_line_help(capsys):
    with pytest.raises(SystemExit): main(['--help'])
    assert '--bundle' in capsys.readouterr().out

def test_settings_of_the_optimizer():
    "The values of the models in the package"
    net = torch.nn.Linear(1, 1)
    values = pretraining.make_adamw(net, .25).defaults
    assert {k: values[k] for k in ('lr', 'betas', 'eps', 'weight_decay')} == {
        'lr': .25, 'betas': (.9, .99), 'eps': 1e-8, 'weight_decay': .01}

def test_settings_of_pretraining_reach_both_trainings(monkeypatch, tmp_path):
    calls = {}
    def train_vae(vae, images, out, total_steps, deadline):
        calls['vae'] = images.shape, out, total_steps
        return total_steps
    def train_denoiser(pipe, images, validation_images, out, total_steps, deadline):
        calls['denoiser'] = images.shape, len(validation_images), out, total_steps
    monkeypatch.setattr(pretraining, 'train_vae', train_vae)
    monkeypatch.setattr(pretraining, 'train_denoiser', train_denoiser)
    out = tmp_path/'tiny-flux'
    pretrain('tiny-flux', tmp_path, n_images=3, size=64, vae_steps=5, denoiser_steps=7)
    assert calls == {'vae': ((3, 64, 64), out, 5), 'denoiser': ((3, 64, 64), 3, out, 7)}
    pretrain('tiny-flux', tmp_path, n_images=2, size=32)               # cached images are of another size
    assert calls['vae'] == ((2, 32, 32), out, 2000) and calls['denoiser'][-1] == 6400
    (tmp_path/'train.npy').write_bytes((tmp_path/'train.npy').read_bytes()[:200])
    pretrain('tiny-flux', tmp_path, n_images=2, size=32)
    assert len(np.load(tmp_path/'train.npy')) == 2

@pytest.mark.long('two pretrainings, 7 s')
def test_pretraining_stops_at_nan_and_goes_on(monkeypatch, tmp_path):
    settings = dict(n_images=4, size=64, vae_steps=1, denoiser_steps=3)
    loss = pretraining.denoising_loss
    def nan_at_step_3(*args, **kwargs): return loss(*args, **kwargs)*(np.nan if args[5] == 2 else 1)
    pretrain('tiny-flux', tmp_path, **settings | dict(denoiser_steps=2))
    with monkeypatch.context() as patch:
        patch.setattr(pretraining, 'denoising_loss', nan_at_step_3)
        with pytest.raises(TrainingDiverged, match='diverged at step 3: loss is nan.*resumes from step 2'):
            pretrain('tiny-flux', tmp_path, **settings)
    file = tmp_path/'tiny-flux'/'denoiser.safetensors'
    assert load_checkpoint(file, {})['step'] == 2
    pretrain('tiny-flux', tmp_path, **settings)
    assert load_checkpoint(file, {})['step'] == 3
    os.truncate(file, 99)
    pretrain('tiny-flux', tmp_path, **settings)
    assert load_checkpoint(file, {})['step'] == 3

"The small bases: what they are made of, that stock classes draw with them, that the card's numbers come out again, and that no study's patient is among theirs"
import hashlib, json, re, shutil
import numpy as np, pandas as pd, pytest, torch
from safetensors import safe_open
from conftest import ROOT, sh
from elbowsynth.diffusion.pretraining import (
    bundled_model, bundled_models_dir, caption_embeddings, encode, file_manifest, held_out_data,
    inpaint_with, lr_schedule, main, masked_ssim, nearest_by_context, normal_image, PATIENT_SEEDS,
    predict, pretrain, random_masks, scale_latents, sharpness_ratio, summary_table, telea_inpaint,
    vae_reconstruct)
from elbowsynth.diffusion.small_models import build_vae, BUILDERS, count_params
from elbowsynth.diffusion.sampling import composite
from elbowsynth.stages import profile_values, stages
from elbowsynth.data.classes import caption, PATHOLOGIES, VIEWS
from elbowsynth.phantom.phantom import phantom, phantom_dataset_plan
from elbowsynth.training import load_checkpoint

NAMES = list(BUILDERS)
manifest = json.loads((bundled_models_dir()/'manifest.json').read_text())
scores = pd.read_csv(bundled_models_dir()/'held_out.csv')

@pytest.fixture(scope='module')
def bases():
    from diffusers import FluxFillPipeline, StableDiffusionXLInpaintPipeline
    kinds = {'tiny-sdxl': StableDiffusionXLInpaintPipeline, 'tiny-flux': FluxFillPipeline}
    found = {k: kinds[k].from_pretrained(bundled_model(k), use_safetensors=True, local_files_only=True) for k in NAMES}
    for p in found.values(): p.set_progress_bar_config(disable=True)
    return found

def test_files_are_small_named_and_cannot_execute():
    assert file_manifest(bundled_models_dir())==manifest['files']
    beside = [p for p in bundled_models_dir().iterdir() if p.is_file()]
    assert {p.name for p in beside}=={'manifest.json', 'held_out.csv', 'curves.csv'}
    assert sum(b for b, _ in manifest['files'].values())+sum(p.stat().st_size for p in beside)<=15e6
    assert {p.rsplit('.', 1)[1] for p in manifest['files']}<={'safetensors', 'json', 'txt', 'md', 'model'}
    for name in NAMES:
        assert {p.split('/')[1] for p in manifest['files'] if p.startswith(name+'/') and p.count('/')>1}>={'vae', 'text_encoder', 'text_encoder_2', 'tokenizer', 'tokenizer_2', 'scheduler'}
    for p in bundled_models_dir().rglob('*.safetensors'):
        with safe_open(p, 'pt') as f: assert all(f.get_tensor(k).isfinite().all() for k in f.keys())

def test_manifest_sees_a_changed_byte(tmp_path):
    shutil.copytree(bundled_models_dir(), tmp_path/'tiny')
    card = tmp_path/'tiny'/'tiny-sdxl'/'README.md'
    card.write_bytes(card.read_bytes()+b' ')
    assert [k for k, v in file_manifest(tmp_path/'tiny').items() if v!=manifest['files'][k]]==['tiny-sdxl/README.md']

@pytest.mark.parametrize('name', NAMES)
def test_architecture_is_the_real_one_in_small(bases, name):
    pipe, fresh = bases[name], BUILDERS[name]()
    assert count_params(pipe)==manifest['weights'][name]==count_params(fresh)
    assert 1e6<=sum(count_params(pipe).values())<=3.5e6
    assert pipe.vae_scale_factor==8
    real = {'tiny-sdxl': lambda p: (p.unet.config.in_channels, p.unet.config.out_channels, p.vae.config.latent_channels, p.unet.config.addition_embed_type),
            'tiny-flux': lambda p: (p.transformer.config.in_channels, p.transformer.config.out_channels, p.vae.config.latent_channels, p.transformer.config.guidance_embeds)}
    assert real[name](pipe)=={'tiny-sdxl': (9, 4, 4, 'text_time'), 'tiny-flux': (384, 64, 16, True)}[name]
    for part in ('text_encoder', 'text_encoder_2'):                     # as drawn: only what is trained has changed
        for a, b in zip(getattr(pipe, part).state_dict().values(), getattr(fresh, part).state_dict().values()): assert torch.equal(a, b)

@pytest.mark.parametrize('name', NAMES)
def test_every_caption_is_another_one_to_the_net(bases, name):
    pipe, said = bases[name], [caption(v, [p]) for v in VIEWS for p in PATHOLOGIES]
    for tokenizer in (pipe.tokenizer, pipe.tokenizer_2):
        ids = tokenizer(said).input_ids
        assert len({tuple(i) for i in ids})==28 and max(map(len, ids))<=tokenizer.model_max_length
        assert not any(tokenizer.unk_token_id in i for i in ids if tokenizer.unk_token_id not in (tokenizer.eos_token_id, tokenizer.pad_token_id))
    texts, = [pipe.encode_prompt(said, None, 'cpu', max_sequence_length=24)[0] if name=='tiny-flux' else pipe.encode_prompt(said, device='cpu', do_classifier_free_guidance=False)[0]]
    apart = torch.cdist(texts.flatten(1)[None], texts.flatten(1)[None])[0]
    assert apart[~torch.eye(28, dtype=bool)].min()>.1

@pytest.mark.parametrize('name', NAMES)
def test_latents_have_the_size_of_noise(bases, name):
    z = scale_latents(bases[name].vae, encode(bases[name].vae, held_out_data(16)[0]))
    assert abs(z.mean())<.1 and .9<z.std()<1.1
    assert z.std((0, 2, 3)).min()>.5 and z.mean((0, 2, 3)).abs().max()<.7

@pytest.mark.parametrize('name, size', [(n, s) for n in NAMES for s in (64, 128, 176)])
def test_stock_pipelines_draw_at_several_sizes(bases, name, size):
    film, hole = (torch.full((1, 3, size, size), .3), torch.zeros(1, 1, size, size))
    hole[..., 16:48, 16:48] = 1
    more = {'max_sequence_length': 24} if name=='tiny-flux' else {'guidance_scale': 1.5}
    images = [bases[name](prompt=caption('AP', ['olecranon fracture']), image=film, mask_image=hole, height=size, width=size, num_inference_steps=2, output_type='np',
                          generator=torch.Generator().manual_seed(0), **more).images for _ in range(2)]
    assert images[0].shape==(1, size, size, 3) and np.isfinite(images[0]).all() and np.array_equal(*images)

def test_the_gate():
    mean = scores.groupby('way')[['ssim', 'l1']].mean()
    assert scores.film.nunique()>=64
    for name in NAMES:
        for rival in ('telea', 'nearest', 'grey'): assert mean.ssim[name]>mean.ssim[rival], (name, rival)
        assert mean.ssim[f'{name} autoencoder']>mean.ssim[name]         # nobody surpasses the autoencoder
        better = scores[scores.way==name].ssim.values-scores[scores.way=='telea'].ssim.values
        assert better.mean()-1.96*better.std()/len(better)**.5>0

def test_scores_come_out_again(bases):
    films, holes = held_out_data(6)
    near = np.stack([normal_image(i) for i in scores[scores.way=='telea'].nearest[:6]])
    again = {'telea': telea_inpaint(films, holes), 'nearest': composite(films, near, holes)} | {k: inpaint_with(p, films, holes) for k, p in bases.items()}
    again |= {f'{k} autoencoder': composite(films, vae_reconstruct(p.vae, films), holes) for k, p in bases.items()}
    for way, made in again.items():
        told = scores[(scores.way==way) & (scores.film<6)]
        assert np.abs(masked_ssim(films, made, holes)-told.ssim).max()<.02, way
        assert np.allclose(sharpness_ratio(films, made, holes), told.detail, atol=.05, rtol=.1), way

@pytest.mark.parametrize('name', NAMES)
def test_the_card_tells_the_measured(name):
    card, table = (bundled_model(name)/'README.md').read_text(), summary_table(scores)
    for way in ('telea', 'nearest', name, f'{name} autoencoder'): assert f'| {way} | {" | ".join(table.loc[way])} |' in card
    assert 'license: apache-2.0' in card and f'{sum(manifest["weights"][name].values())/1e6:.2f} million' in card
    curve = pd.read_csv(bundled_models_dir()/'curves.csv').query('base==@name')
    for net, word in (('vae', 'steps of the autoencoder'), ('net', 'of the denoiser')): assert f'{curve[curve.net==net].step.max():,} {word}' in card
    check = curve.check.dropna()
    assert check.iloc[-1]<check.iloc[0]

def test_no_patient_of_a_study_is_among_theirs():
    known, theirs = stages(ROOT/'nbs'), min(PATIENT_SEEDS.values())
    default = next(s.defaults for s in known if s.name=='phantom')
    profiles = [default | profile_values(p.stem, known).get('phantom', {}) for p in (ROOT/'params').glob('*.yaml')]
    assert len(profiles)>=3
    for p in profiles: assert max(f['seed'] for f in phantom_dataset_plan(p['n_patients'], p['seed']))<theirs
    assert max(f['seed'] for f in phantom_dataset_plan(2000, 10**6))<theirs
    starts = sorted(PATIENT_SEEDS.values())
    assert min(b-a for a, b in zip(starts, starts[1:]))>10**6           # sets do not meet
    same = lambda seed: phantom('AP', ['normal'], seed=seed, size=48).image
    assert (same(10**15)!=same(0)).mean()>.3 and (same(10**15)!=same(10**15%2**32)).mean()>.3   # big seeds are not cut to smaller ones

def test_a_stopped_pretraining_ends_where_a_whole_one_does(tmp_path):
    few = dict(n=6, size=64, vae_steps=1, steps=2)
    main([str(tmp_path/'whole'), '--base', 'tiny-flux', '--n', '6', '--size', '64', '--vae_steps', '1', '--steps', '2'])
    shutil.copytree(tmp_path/'whole', tmp_path/'parts', ignore=shutil.ignore_patterns('tiny-flux'))
    for _ in range(3): pretrain('tiny-flux', tmp_path/'parts', max_minutes=1e-6, **few)
    a, b = ({p.parent.name: p.read_bytes() for p in (tmp_path/d/'tiny-flux'/'model').rglob('*.safetensors')} for d in ('whole', 'parts'))
    assert a==b and set(a)=={'vae', 'transformer', 'text_encoder', 'text_encoder_2'}
    pretrain('tiny-flux', tmp_path/'parts', **few | {'steps': 3})       # a longer one goes on
    state = load_checkpoint(tmp_path/'parts'/'tiny-flux'/'net.safetensors', {})
    assert state['step']==3

def test_holes_of_measurement_are_fixed():
    films, holes = held_out_data(2)
    assert np.array_equal(holes, random_masks(64, 128, 11)[:2]) and films.shape==(2, 128, 128)
    assert lr_schedule(0, 100, 1.)>0 and lr_schedule(100, 100, 1.)==0

def test_what_is_missing_is_told(monkeypatch, tmp_path):
    import elbowsynth.diffusion.pretraining
    monkeypatch.setattr(elbowsynth.diffusion.pretraining, 'tiny_folder', lambda: tmp_path)
    with pytest.raises(FileNotFoundError, match='python -m elbowsynth.diffusion.pretraining OUT --base tiny-flux'): bundled_model('tiny-flux')
    with pytest.raises(ValueError, match='there are tiny-sdxl, tiny-flux'): bundled_model('flux')
    assert '--ship' in sh('python', '-m', 'elbowsynth.diffusion.pretraining', '--help').stdout

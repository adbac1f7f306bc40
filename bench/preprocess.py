"""How fast the stage `preprocess` is, what memory it takes, and how often it is right.

    python bench/preprocess.py             films a second on one core and on two, memory for N and 4N films, peer beside it
    python bench/preprocess.py --right 500 films with every nuisance: errors of polarity and crop, writing found, letters kept; --sheet FILE for their pictures
"""
import os
for name in ('OMP_NUM_THREADS', 'OPENBLAS_NUM_THREADS'): os.environ[name] = '1'
import argparse, json, statistics, subprocess, sys, tempfile, time
from pathlib import Path
import cv2, numpy as np, pandas as pd
from elbowsynth.core import parallel_map
from elbowsynth.data.classes import PATHOLOGIES
from elbowsynth.data.images import read_image, write_png
from elbowsynth.phantom.phantom import ARTIFACTS, phantom
from elbowsynth.data.preprocess import crop_errors, preprocess, remove_overlay, to_grayscale
from results import keep
cv2.setNumThreads(1)

def folder_of(where, n, deep=False):
    "`n` films of 1536 x 1920 with a table, no two alike"
    films = [cv2.resize(phantom(v, ['normal'], seed=s, size=1024).image, (1536, 1920), interpolation=cv2.INTER_CUBIC) for s,v in enumerate(('AP', 'LAT'))]
    noise = np.random.default_rng(0).normal(0, 2, films[0].shape)
    rows = ['file,patient,view,side,pathology']
    for i in range(n):
        image = np.clip(films[i%2]+np.roll(noise, 7*i, 1), 0, 255)
        write_png(where/f'{i}.png', (image*16).astype(np.uint16) if deep else image.astype(np.uint8))
        rows.append(f'{i}.png,P{i},{("AP", "LAT")[i%2]},L,normal')
    (where/'labels.csv').write_text('\n'.join(rows)+'\n')
    return where

def peer(path, out):
    "The same steps with Pillow and scikit-image: crop of even borders, inversion by the rim, CLAHE, resize"
    from PIL import Image
    from skimage.exposure import equalize_adapthist
    image = np.asarray(Image.open(path).convert('L'))
    rows, columns = np.flatnonzero(np.ptp(image, 1)>5), np.flatnonzero(np.ptp(image, 0)>5)
    image = image[rows[0]:rows[-1]+1, columns[0]:columns[-1]+1]
    if np.median(image[:, :50])>image.mean(): image = 255-image
    even = (equalize_adapthist(image, kernel_size=(image.shape[0]//8, image.shape[1]//8), clip_limit=.008)*255).astype(np.uint8)
    Image.fromarray(even).resize((1024, 1024), Image.Resampling.BOX).save(out)

def one_core(films, out):
    "Seconds of processor time a film: decode, preprocess, write; the median"
    def one(path):
        start = time.thread_time()
        write_png(out/path.name, preprocess(read_image(path)).image)
        return time.thread_time()-start
    return statistics.median(one(p) for p in films)

def peak(folder, jobs):
    "Seconds and peak memory in MiB of a run in a process of its own"
    code = ('import sys, time, resource, cv2; cv2.setNumThreads(1); from elbowsynth.data.preprocess import preprocess_folder; start = time.perf_counter(); '
            'preprocess_folder(sys.argv[1], sys.argv[2], jobs=int(sys.argv[3])); print(time.perf_counter()-start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1024)')
    with tempfile.TemporaryDirectory() as out:
        text = subprocess.run([sys.executable, '-c', code, str(folder), out, str(jobs)], capture_output=True, text=True, check=True).stdout
    return [float(v) for v in text.split()[-2:]]

def speed(n):
    with tempfile.TemporaryDirectory() as tmp:
        some, many, deep = (Path(tmp)/o for o in ('some', 'many', 'deep'))
        for o in (some, many, deep): o.mkdir()
        folder_of(some, n), folder_of(many, 4*n), folder_of(deep, 6, deep=True)
        (Path(tmp)/'out').mkdir()
        films = sorted(some.glob('*.png'))
        ours, at16 = (one_core(f, Path(tmp)/'out') for f in (films, sorted(deep.glob('*.png'))))
        start = time.process_time()
        for p in films[:4]: peer(p, Path(tmp)/'out'/'peer.png')
        theirs = (time.process_time()-start)/4
        alone, together = (min(peak(some, j)[0] for _ in range(3)) for j in (1, 2))
        return {'films_per_second_one_core': round(1/ours, 2), 'at_16_bits': round(1/at16, 2), 'peer_films_per_second': round(1/theirs, 2), 'ours_over_peer': round(theirs/ours, 1),
                'two_cores_over_one': round(alone/together, 2), 'mib_for_n': round(peak(some, 2)[1]), 'mib_for_4n': round(peak(many, 2)[1]), 'n': n}

def right(n, size, sheet, seed):
    def one(i):
        rng = np.random.default_rng([i, 99])
        nuisances = [o for o in ARTIFACTS if o!='coloured overlay' or i%2]
        film = phantom(('AP', 'LAT')[i%2], [PATHOLOGIES[i%14]], 'LR'[i%3>0], age=float(rng.uniform(2, 70)), seed=seed+i, size=size, artifacts=nuisances)
        done, (bare, ink) = preprocess(film.image, 256), remove_overlay(film.image)
        g, grown = done.geometry, cv2.dilate(film.overlay.astype(np.uint8), np.ones((5, 5)))>0
        box = g.top, g.left, g.bottom, g.right
        t,l,b,r = film.marker
        off = [max(abs(p-q)/(s or 1) for p,q,s in zip(box, film.field, (film.field[2]-film.field[0], film.field[3]-film.field[1])*2))]
        lost = (ink & ~cv2.dilate(grown.astype(np.uint8), np.ones((9, 9))).astype(bool))[t:b, l:r].mean()
        row = {'film': i, 'polarity': done.report['inverted']!=film.inverted, 'crop': ' '.join(crop_errors(to_grayscale(bare), box, film.field, grown)), 'two_in_hundred': off[0]>.02,
               'crop_at_2': ' '.join(crop_errors(to_grayscale(bare), box, film.field, grown, .02)), 'found': float((ink & film.overlay).sum()/max(1, film.overlay.sum())), 'letter_lost': bool(lost>.03)}
        bad = row['polarity'] or row['crop']
        picture = np.repeat(to_grayscale(film.image)[..., None], 3, 2) if bad else None
        if bad:
            for (t,l,b,r),colour in ((film.field, (0, 255, 0)), (box, (0, 0, 255))): cv2.rectangle(picture, (l, t), (r-1, b-1), colour, 2)
        return row, picture
    done = list(parallel_map(one, range(n)))
    rows, wrong = pd.DataFrame([r for r,_ in done]), [cv2.resize(p, (384, 384), interpolation=cv2.INTER_AREA) for _,p in done if p is not None]
    if sheet and wrong:
        wrong += [wrong[0]*0]*(-len(wrong)%4)
        cv2.imwrite(sheet, np.vstack([np.hstack(wrong[i:i+4]) for i in range(0, len(wrong), 4)]))
    return {'films': n, 'size': size, 'polarity_wrong': int(rows.polarity.sum()), 'crop_wrong': int((rows.crop!='').sum()), 'crop_wrong_at_2_in_100': int((rows.crop_at_2!='').sum()),
            'off_by_2_in_100_seen_or_not': int(rows.two_in_hundred.sum()), 'writing_found': round(rows.found.mean(), 3), 'writing_found_worst_tenth': round(rows.found.quantile(.1), 3),
            'letters_touched': int(rows.letter_lost.sum()), 'wrong': rows.film[(rows.crop!='') | rows.polarity].tolist()}

if __name__=='__main__':
    a = argparse.ArgumentParser()
    a.add_argument('--films', type=int, default=16)
    a.add_argument('--right', type=int, default=0)
    a.add_argument('--size', type=int, default=512)
    a.add_argument('--seed', type=int, default=10_000)
    a.add_argument('--sheet', default='')
    o = a.parse_args()
    if o.right: print(json.dumps(right(o.right, o.size, o.sheet, o.seed), indent=1))
    else: keep('preprocess', 'Preprocessing', 'Films of 1536 x 1920, from file to file; the peer does the same steps with Pillow and scikit-image. `python bench/preprocess.py`.',
               [{'what': k.replace('_', ' '), 'value': v} for k,v in speed(o.films).items()])

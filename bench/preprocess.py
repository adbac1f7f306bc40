"""Speed, memory and accuracy of the stage `preprocess`.

    python bench/preprocess.py                 images per second on one core and on two, memory for
                                               N and 4N images, next to a reference implementation
    python bench/preprocess.py --accuracy 500  500 images with all artifacts: errors of polarity and
                                               crop, overlay removed, markers kept (a marker that
                                               text crosses is taken out whole); --sheet FILE
                                               writes pictures of the wrong ones
"""
import os
for name in ('OMP_NUM_THREADS', 'OPENBLAS_NUM_THREADS'): os.environ[name] = '1'
import argparse, json, statistics, subprocess, sys, tempfile, time
from pathlib import Path
import cv2, numpy as np, pandas as pd
from elbowsynth.core import parallel_map
from elbowsynth.data.classes import PATHOLOGIES
from elbowsynth.data.images import read_image, to_grayscale, write_png
from elbowsynth.data.overlays import remove_overlay
from elbowsynth.data.preprocess import crop_errors, preprocess
from elbowsynth.phantom.phantom import ARTIFACTS, phantom
from results import write_results
cv2.setNumThreads(1)

def write_folder(folder, n, is_16bit=False):
    "`n` different images of 1536 x 1920 with their labels table"
    folder.mkdir()
    images = []
    for seed,view in enumerate(('AP', 'LAT')):
        image = phantom(view, ['normal'], seed=seed, size=1024).image
        images.append(cv2.resize(image, (1536, 1920), interpolation=cv2.INTER_CUBIC))
    noise = np.random.default_rng(0).normal(0, 2, images[0].shape)
    rows = ['file,patient,view,side,pathology']
    for i in range(n):
        image = np.clip(images[i%2]+np.roll(noise, 7*i, 1), 0, 255)
        write_png(folder/f'{i}.png', (image*16).astype(np.uint16) if is_16bit else image.astype(np.uint8))
        rows.append(f'{i}.png,P{i},{("AP", "LAT")[i%2]},L,normal')
    (folder/'labels.csv').write_text('\n'.join(rows)+'\n')
    return folder

def reference(path, out):
    "The same steps with Pillow and scikit-image: crop uniform borders, invert by the rim, CLAHE, resize"
    from PIL import Image
    from skimage.exposure import equalize_adapthist
    image = np.asarray(Image.open(path).convert('L'))
    rows, columns = np.flatnonzero(np.ptp(image, 1)>5), np.flatnonzero(np.ptp(image, 0)>5)
    image = image[rows[0]:rows[-1]+1, columns[0]:columns[-1]+1]
    if np.median(image[:, :50])>image.mean(): image = 255-image
    tile = (image.shape[0]//8, image.shape[1]//8)
    equalized = (equalize_adapthist(image, kernel_size=tile, clip_limit=.008)*255).astype(np.uint8)
    Image.fromarray(equalized).resize((1024, 1024), Image.Resampling.BOX).save(out)

def seconds_per_image(paths, out):
    "Median CPU seconds to decode, preprocess and write an image"
    seconds = []
    for path in paths:
        start = time.thread_time()
        write_png(out/path.name, preprocess(read_image(path)).image)
        seconds.append(time.thread_time()-start)
    return statistics.median(seconds)

RUN_CODE = '''
import sys, time, resource, cv2
cv2.setNumThreads(1)
from elbowsynth.data.preprocess import preprocess_folder
start = time.perf_counter()
preprocess_folder(sys.argv[1], sys.argv[2], n_threads=int(sys.argv[3]))
print(time.perf_counter()-start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1024)
'''

def time_and_memory(folder, n_threads):
    "Seconds and peak memory in MiB of a run in its own process"
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, '-c', RUN_CODE, str(folder), out, str(n_threads)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return [float(v) for v in text.split()[-2:]]

def speed(n):
    "Speed and memory for `n` images"
    with tempfile.TemporaryDirectory() as tmp:
        out = Path(tmp)/'out'
        out.mkdir()
        few, many = write_folder(Path(tmp)/'few', n), write_folder(Path(tmp)/'many', 4*n)
        deep = write_folder(Path(tmp)/'deep', 6, is_16bit=True)
        paths = sorted(few.glob('*.png'))
        seconds_8bit = seconds_per_image(paths, out)
        seconds_16bit = seconds_per_image(sorted(deep.glob('*.png')), out)
        start = time.process_time()
        for path in paths[:4]: reference(path, out/'reference.png')
        seconds_reference = (time.process_time()-start)/4
        one_core = min(time_and_memory(few, 1)[0] for _ in range(3))
        two_cores = min(time_and_memory(few, 2)[0] for _ in range(3))
        return {'images_per_second_one_core': round(1/seconds_8bit, 2),
                'at_16_bits': round(1/seconds_16bit, 2),
                'reference_images_per_second': round(1/seconds_reference, 2),
                'speedup': round(seconds_reference/seconds_8bit, 1),
                'two_cores_over_one': round(one_core/two_cores, 2),
                'mib_for_n': round(time_and_memory(few, 2)[1]),
                'mib_for_4n': round(time_and_memory(many, 2)[1]), 'n': n}

def evaluate(i, size, seed):
    "Errors of one simulated radiograph, and a picture of it if polarity or crop are wrong"
    rng = np.random.default_rng([i, 99])
    artifacts = [a for a in ARTIFACTS if a!='colored overlay' or i%2]
    made = phantom(('AP', 'LAT')[i%2], [PATHOLOGIES[i%14]], 'LR'[i%3>0], age=float(rng.uniform(2, 70)),
                   seed=seed+i, size=size, artifacts=artifacts)
    done, (without_overlay, removed) = preprocess(made.image, 256), remove_overlay(made.image)
    g, gray = done.geometry, to_grayscale(without_overlay)
    box = g.top, g.left, g.bottom, g.right
    near_overlay = cv2.dilate(made.overlay.astype(np.uint8), np.ones((5, 5)))>0
    sides = (made.field[2]-made.field[0], made.field[3]-made.field[1])*2
    deviation = max(abs(found-true)/(side or 1) for found,true,side in zip(box, made.field, sides))

    top,left,bottom,right = made.marker
    far_from_overlay = ~cv2.dilate(near_overlay.astype(np.uint8), np.ones((9, 9))).astype(bool)
    row = {'image': i, 'polarity': done.report['inverted']!=made.inverted,
           'crop': ' '.join(crop_errors(gray, box, made.field, near_overlay)),
           'crop_at_2': ' '.join(crop_errors(gray, box, made.field, near_overlay, .02)),
           'deviates_by_2': deviation>.02,
           'removed': float((removed & made.overlay).sum()/max(1, made.overlay.sum())),
           'marker_removed': not made.overlay[top:bottom, left:right].any() and bool(
               (removed & far_from_overlay)[top:bottom, left:right].mean()>.03)}
    if not row['polarity'] and not row['crop']: return row, None
    picture = np.repeat(to_grayscale(made.image)[..., None], 3, 2)
    for (top,left,bottom,right),color in ((made.field, (0, 255, 0)), (box, (0, 0, 255))):
        cv2.rectangle(picture, (left, top), (right-1, bottom-1), color, 2)
    return row, cv2.resize(picture, (384, 384), interpolation=cv2.INTER_AREA)

def accuracy(n, size, sheet, seed):
    "Errors of `n` simulated radiographs with all artifacts; wrong ones are shown in the file `sheet`"
    results = list(parallel_map(lambda i: evaluate(i, size, seed), range(n)))
    rows, pictures = pd.DataFrame([row for row,_ in results]), [p for _,p in results if p is not None]
    if sheet and pictures:
        pictures += [pictures[0]*0]*(-len(pictures)%4)
        cv2.imwrite(sheet, np.vstack([np.hstack(pictures[i:i+4]) for i in range(0, len(pictures), 4)]))
    is_wrong = (rows.crop!='') | rows.polarity
    return {'images': n, 'size': size,
            'polarity_wrong': int(rows.polarity.sum()),
            'crop_wrong': int((rows.crop!='').sum()),
            'crop_wrong_at_2_percent': int((rows.crop_at_2!='').sum()),
            'deviates_by_2_percent_visibly_or_not': int(rows.deviates_by_2.sum()),
            'overlay_removed': round(rows.removed.mean(), 3),
            'overlay_removed_worst_tenth': round(rows.removed.quantile(.1), 3),
            'markers_removed': int(rows.marker_removed.sum()),
            'wrong': rows.image[is_wrong].tolist()}

if __name__=='__main__':
    parser = argparse.ArgumentParser()
    parser.add_argument('--images', type=int, default=16)
    parser.add_argument('--accuracy', type=int, default=0)
    parser.add_argument('--size', type=int, default=512)
    parser.add_argument('--seed', type=int, default=10_000)
    parser.add_argument('--sheet', default='')
    o = parser.parse_args()
    if o.accuracy: print(json.dumps(accuracy(o.accuracy, o.size, o.sheet, o.seed), indent=1))
    else:
        rows = [{'benchmark': k.replace('_', ' '), 'value': v} for k,v in speed(o.images).items()]
        text = ('Images of 1536 x 1920, from file to file; the reference does the same steps with '
                'Pillow and scikit-image. `python bench/preprocess.py`.')
        write_results('preprocess', 'Preprocessing', text, rows)

"What importers promise and a page has no room for: real radiographs, compressed ones, hostile files, persons, the command"
import hashlib, os, re, shutil, struct, sys
from pathlib import Path
import cv2, numpy as np, pandas as pd, pydicom, pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from conftest import sh
from elbowsynth.core import save_json
from elbowsynth.data.labels import LabelsError, read_labels
from elbowsynth.data.images import read_image, write_png
from elbowsynth.data.dicom import (
    apply_voi, dicom_error, display_pixels, import_dicom, is_dicom, match_single_term,
    read_dicom_image, voi_table)
from elbowsynth.data.importers import (
    difference_hash, encode_png, import_folder, near_duplicate_groups, unique_names)
from elbowsynth.data.public_datasets import import_fracatlas, import_mura, import_png16, import_yolo
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.pixels import apply_modality_lut, apply_voi_lut

def bundled(name):
    "A file of pydicom's own tests, never one from the network"
    return Path(get_testdata_file(name, download=False))

def real(name):
    "A radiograph of pydicom-data"
    import data_store
    return Path(data_store.__file__).parent/'data'/name

PERSON = dict(PatientName='Zweifel^Balthasar', PatientID='KH-7741902', PatientBirthDate='19710314', StudyDate='20231108', SeriesDate='20231108', StudyTime='142233',
              AccessionNumber='ACC55120', InstitutionName='Kantonsspital Nirgendwo', ReferringPhysicianName='Quincke^Ottilie', OperatorsName='Hollerbusch', StationName='RAUM-3-DX',
              StudyInstanceUID='1.2.826.0.1.3680043.8.498.771', SeriesInstanceUID='1.2.826.0.1.3680043.8.498.772', SOPInstanceUID='1.2.826.0.1.3680043.8.498.773',
              SeriesDescription='Zweifel Ellbogen lateral links', StudyDescription='LEFT elbow of Balthasar', PatientComments='fell off a horse', PatientAge='052Y')

def film(values, **tags):
    "A DICOM film built in memory"
    values = np.atleast_2d(values)
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID, ds.file_meta.MediaStorageSOPClassUID = '1.2.840.10008.1.2.1', '1.2.840.10008.5.1.4.1.1.1.1'
    ds.SOPClassUID, ds.SOPInstanceUID, ds.Modality, ds.PhotometricInterpretation = ds.file_meta.MediaStorageSOPClassUID, '1.2.826.0.1.3680043.8.498.1', 'DX', 'MONOCHROME2'
    ds.SamplesPerPixel, (ds.Rows, ds.Columns), ds.BitsAllocated, ds.BitsStored = values.shape[2] if values.ndim==3 else 1, values.shape[:2], 8*values.itemsize, 8*values.itemsize
    for k, v in tags.items(): setattr(ds, k, v)
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID
    ds.HighBit, ds.PixelRepresentation = ds.BitsStored-1, int(values.dtype.kind=='i')
    ds.add_new('PixelData', 'OW', values.tobytes()+b'\0'*(values.nbytes%2))
    return ds

def save(path, ds):
    path.parent.mkdir(parents=True, exist_ok=True)
    ds.save_as(path, enforce_file_format=True)
    return path

def noise(seed, h=40, w=50, top=4096, dtype=np.uint16): return np.random.default_rng(seed).integers(0, top, (h, w)).astype(dtype)
def values(ds, *a, **k): return display_pixels(ds, *a, **k)[0]
def files_of(folder): return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(Path(folder).rglob('*')) if p.is_file()}

# ---------------------------------------------------------------- real radiographs

def test_real_radiographs(tmp_path):
    for name in ('RG1_UNCR', 'RG1_J2KR', 'RG3_UNCR', 'RG3_J2KR', 'RG3_J2KI'): (tmp_path/'in').mkdir(exist_ok=True); shutil.copy(real(f'{name}.dcm'), tmp_path/'in'/name)
    got = import_dicom(tmp_path/'in', tmp_path/'out', licence='public')
    assert got.summary['films']==3 and got.summary['patients']==2                       # the lossless copies are the same pictures
    assert sorted(got.rejects.reason)==['the same picture as another film']*2
    chest, leg = got.labels[got.labels.body_part=='CHEST'].iloc[0], got.labels[got.labels.body_part=='EXTREMITY'].iloc[0]
    assert (chest['view'], chest.side, chest.window, chest.inverted, chest.spacing)==('AP', '', 'window 15000 30000', '1', '')   # it says that a pixel has no size
    assert (leg['view'], leg.side, leg.window, leg.bits)==('AP', 'R', 'window 550 1024', '16')
    ds = pydicom.dcmread(real('RG3_UNCR.dcm'))
    assert ds.PhotometricInterpretation=='MONOCHROME1' and ds.BitsStored==10
    stored = ds.pixel_array.astype(float)
    by_hand = 1-np.clip((stored-549.5)/1023+.5, 0, 1)                                    # PS3.3 C.11.2.1.2: centre 550, width 1024; then inverted
    film = read_image(tmp_path/'out'/next(f for f in got.labels.file if read_image(tmp_path/'out'/f).shape==stored.shape and np.abs(read_image(tmp_path/'out'/f)-by_hand*65535).max()<1))
    bone, air = film[430:470, 790:830].mean(), film[430:470, 480:560].mean()               # the tibia's shaft, and the black beside the leg
    assert bone>4*air, (bone, air)

def test_lossless_and_plain_files_agree():
    for a, b in (('RG1_UNCR', 'RG1_J2KR'), ('RG3_UNCR', 'RG3_J2KR'), ('RG1_UNCI', 'RG1_J2KI')):
        assert np.array_equal(*(read_dicom_image(real(f'{n}.dcm'))[0] for n in (a, b)))

def test_all_of_pydicoms_files_end_as_films_or_reasons(tmp_path):
    "CT, MR, ultrasound, reports, several frames, private or broken syntax: never a crash"
    folder = bundled('CT_small.dcm').parent
    got = import_dicom(folder, tmp_path/'out')
    assert len(got.labels)+len(got.rejects)==sum(p.is_file() and not p.name.startswith('.') for p in folder.rglob('*')) - sum(p.name.startswith('.') for p in folder.rglob('*') if p.is_dir())
    reasons = dict(got.rejects.values)
    assert reasons['reportsi.dcm']=='no picture: Basic Text SR Storage'
    assert reasons['CT_small.dcm']=='no radiograph: CT Image Storage'
    assert any(r.startswith('no picture: Media Storage Directory') for r in reasons.values())
    assert reasons['README.txt']=='no DICOM file'
    assert not re.search(r'\d\.\d+\.\d+', ' '.join(reasons.values())), 'no numbers of objects in reasons'

# ---------------------------------------------------------------- values

def test_compressed_films_are_what_they_were():
    a = noise(1)
    plain = values(film(a, BitsStored=12, WindowCenter=2048, WindowWidth=4096))
    packed = film(a, BitsStored=12, WindowCenter=2048, WindowWidth=4096)
    packed.compress('1.2.840.10008.1.2.4.90')                                            # JPEG 2000, by pylibjpeg-openjpeg
    assert np.array_equal(values(packed), plain)
    signed = (noise(2).astype(np.int32)-2048).astype(np.int16)
    packed = film(signed, BitsStored=12, WindowCenter=0, WindowWidth=4096)
    packed.compress('1.2.840.10008.1.2.4.90')
    assert np.array_equal(values(packed), values(film(signed, BitsStored=12, WindowCenter=0, WindowWidth=4096)))

def test_jpeg_ls():
    "By pylibjpeg-libjpeg, signed, 16 bits: the file that pydicom ships beside its uncompressed original"
    packed, plain = (pydicom.dcmread(bundled(n)) for n in ('MR_small_jpeg_ls_lossless.dcm', 'MR_small.dcm'))
    for ds in (packed, plain): ds.Modality = 'CR'
    assert packed.file_meta.TransferSyntaxUID.name=='JPEG-LS Lossless Image Compression'
    assert np.array_equal(values(packed), values(plain)) and values(plain).std()>1000

@pytest.mark.parametrize('bits', [8, 10, 12, 14, 16])
@pytest.mark.parametrize('signed', [False, True])
def test_depths(bits, signed):
    "A window over all values maps them to all greys, whatever their depth and sign"
    low = -(1<<bits-1) if signed else 0
    ramp = np.linspace(low, low+(1<<bits)-1, 200).round().astype({8: np.int8, 16: np.int16}[8 if bits==8 else 16] if signed else np.uint8 if bits==8 else np.uint16)
    got = values(film(ramp, BitsStored=bits, WindowCenter=low+(1<<bits-1), WindowWidth=1<<bits)).ravel()
    top = 255 if bits==8 else 65535
    assert np.array_equal(got, np.rint((ramp.astype(float)-low)/((1<<bits)-1)*top))
    assert got.dtype==(np.uint8 if bits==8 else np.uint16)

@settings(max_examples=60, deadline=None)
@given(st.integers(-500, 4500), st.integers(2, 5000), st.sampled_from([.5, 1, 2, 3.25]), st.integers(-1024, 200), st.booleans(), st.sampled_from(['LINEAR', 'LINEAR_EXACT', 'SIGMOID']))
def test_windows_agree_with_pydicom(center, width, slope, intercept, inverse, function):
    ds = film(noise(3, 8, 9), BitsStored=12, WindowCenter=center, WindowWidth=width, RescaleSlope=slope, RescaleIntercept=intercept, VOILUTFunction=function,
              PhotometricInterpretation='MONOCHROME1' if inverse else 'MONOCHROME2')
    theirs = apply_voi_lut(apply_modality_lut(ds.pixel_array, ds), ds)
    low, high = intercept, 4095*slope+intercept
    unit = (theirs-low)/(high-low)
    assert np.abs(values(ds)/65535-(1-unit if inverse else unit)).max()<1e-4

def test_modality_lut_before_window():
    ds, lut = film(np.uint8([0, 1, 2, 3, 200]), WindowCenter=500.5, WindowWidth=1001), Dataset()
    lut.LUTDescriptor, lut.ModalityLUTType = [4, 0, 16], 'US'
    lut.add_new('LUTData', 'US', [0, 250, 500, 1000])
    ds.ModalityLUTSequence = [lut]
    assert values(ds).ravel().tolist()==[0, 64, 128, 255, 255]                            # a quarter, a half, all, and beyond the table its last

@pytest.mark.parametrize('bits', [8, 10, 12, 16])
@pytest.mark.parametrize('kind', ['US', 'OW'])
def test_voi_tables(bits, kind):
    table = ((np.arange(1024)/1023)**2*((1<<bits)-1)).astype(int)
    ds, lut = film(noise(4, 6, 7, 1200), BitsStored=12), Dataset()
    lut.LUTDescriptor = [1024, 50, bits]
    lut.add_new('LUTData', kind, table.tolist() if kind=='US' else struct.pack('<1024H', *table.tolist()))
    ds.VOILUTSequence = [lut]
    by_hand = table[np.clip(ds.pixel_array.astype(int)-50, 0, 1023)]
    assert np.array_equal(apply_voi(ds)[0], by_hand)
    assert np.array_equal(values(ds), np.rint(by_hand/((1<<bits)-1)*65535))
    if bits>8: assert np.array_equal(apply_voi_lut(ds.pixel_array, ds), by_hand)          # pydicom agrees where it can

def test_voi_table_of_bytes_in_words():
    lut = Dataset()
    lut.LUTDescriptor, lut.LUTData = [4, 10, 8], bytes([1, 2, 3, 250])
    assert voi_table(np.array([0, 10, 11, 12, 13, 99]), lut)[0].tolist()==[1, 1, 2, 3, 250, 250]

def test_pydicom_still_needs_help_with_deep_tables():
    "When this fails, pydicom looks VOI tables up rightly and `voi_table` may go"
    ds, lut = film(np.uint16([1000]), BitsStored=12), Dataset()
    lut.LUTDescriptor = [4096, 0, 8]
    lut.add_new('LUTData', 'US', [i//16 for i in range(4096)])
    ds.VOILUTSequence = [lut]
    assert apply_voi_lut(ds.pixel_array, ds).tolist()!=[[62]] and values(ds).tolist()==[[round(62/255*65535)]]

def test_inverse_is_said_once_or_twice():
    ramp, window = np.uint8([0, 100, 255]), dict(WindowCenter=128, WindowWidth=256)
    assert values(film(ramp, **window)).ravel().tolist()==[0, 100, 255]
    for tags in ({'PhotometricInterpretation': 'MONOCHROME1'}, {'PresentationLUTShape': 'INVERSE'}, {'PhotometricInterpretation': 'MONOCHROME1', 'PresentationLUTShape': 'INVERSE'}):
        assert values(film(ramp, **window, **tags)).ravel().tolist()==[255, 155, 0]

def test_padding_is_black():
    signed = np.int16([-2000, -2000, -100, 0, 100])
    assert values(film(signed, PixelPaddingValue=-2000, PhotometricInterpretation='MONOCHROME1')).ravel().tolist()==[0, 0, 65535, 32768, 0]
    assert values(film(np.uint16([0, 3, 10, 20]), PixelPaddingValue=0, PixelPaddingRangeLimit=3)).ravel().tolist()==[0, 0, 0, 65535]
    assert values(film(np.uint16([7, 7]), PixelPaddingValue=7)).max()==0                   # nothing but padding: a flat film, no crash

def test_shutter_is_black():
    ramp = np.arange(1, 21, dtype=np.uint8).reshape(4, 5)
    shutter = dict(ShutterShape='RECTANGULAR', ShutterUpperHorizontalEdge=2, ShutterLowerHorizontalEdge=3, ShutterLeftVerticalEdge=2, ShutterRightVerticalEdge=4)
    got = values(film(ramp, PhotometricInterpretation='MONOCHROME1', **shutter))
    assert (got>0).astype(int).tolist()==[[0]*5, [0, 1, 1, 1, 0], [0, 1, 1, 0, 0], [0]*5]       # of its own range, the highest value is the darkest
    assert values(film(ramp, **shutter | {'ShutterUpperHorizontalEdge': 9})).max()==255          # a shutter that hides all of it is a mistake

def test_overlays_are_not_burned_in():
    ds = pydicom.dcmread(bundled('examples_overlay.dcm'))
    ds.Modality = 'DX'
    before = values(ds)
    assert 0x60000010 in ds
    for tag in [t for t in ds.keys() if t.group & 0xff00==0x6000]: del ds[tag]
    assert np.array_equal(values(ds), before)
    old = noise(5) | np.uint16(0x8000)*(noise(6)%2)                                        # drawn into a bit that the values leave free
    assert np.array_equal(values(film(old, BitsStored=12, WindowCenter=2048, WindowWidth=4096)), values(film(noise(5), BitsStored=12, WindowCenter=2048, WindowWidth=4096)))

def test_colour_stays_and_grey_in_three_channels_goes():
    rgb = np.zeros((6, 6, 3), np.uint8); rgb[1:3] = 200, 30, 10
    tags = dict(PhotometricInterpretation='RGB', PlanarConfiguration=0, Modality='OT')
    assert np.array_equal(values(film(rgb, **tags)), rgb)
    assert values(film(rgb[..., :1].repeat(3, 2), **tags)).shape==(6, 6)
    assert np.array_equal(cv2.imdecode(np.frombuffer(encode_png(rgb), np.uint8), cv2.IMREAD_COLOR)[..., ::-1], rgb)

def test_windows_that_make_no_sense():
    assert apply_voi(film(noise(7), WindowCenter=100, WindowWidth=0))[3].startswith('range')
    empty = film(noise(7))
    empty.WindowCenter = empty.WindowWidth = None
    assert apply_voi(empty)[3].startswith('range')

# ---------------------------------------------------------------- persons

def test_nothing_of_a_person_is_left(tmp_path):
    for k in range(3):
        tags = PERSON | {'SOPInstanceUID': f'1.2.826.0.1.3680043.8.498.77{k}'}
        ds = film(noise(k), BitsStored=12, **tags)
        ds.add_new(0x00091010, 'LO', 'Zweifel private')
        save(tmp_path/'in'/'Zweifel_Balthasar_19710314'/f'1.2.826.0.1.3680043.8.498.77{k}', ds)
    save(tmp_path/'in'/'Zweifel report', film(noise(9), Modality='CT', **PERSON))
    (tmp_path/'in'/'Zweifel.txt').write_text('Balthasar')
    cut = save(tmp_path/'in'/'Zweifel cut', film(noise(8), **PERSON))
    cut.write_bytes(cut.read_bytes()[:-1000])
    got = import_dicom(tmp_path/'in', tmp_path/'out')
    assert got.summary['films']==3 and got.summary['patients']==1 and len(got.rejects)==3
    secrets = [str(v) for v in PERSON.values() if v!='052Y'] + re.findall(r'[A-Za-z]{5,}', ' '.join(map(str, PERSON.values()))) + ['1.2.826', str(tmp_path)]
    secrets = [s for s in secrets if s.lower() not in ('lateral', 'elbow')]
    for name, raw in files_of(tmp_path/'out').items():
        for s in secrets:
            assert s.lower() not in name.lower()
            for code in ('utf-8', 'utf-16-le'): assert s.encode(code) not in raw and s.lower().encode(code) not in raw.lower(), (name, s)
    for p in (tmp_path/'out').glob('*.png'):                                               # a PNG holds its size and its pixels, and nothing more
        raw, at, chunks = p.read_bytes(), 8, []
        while at<len(raw): chunks.append(raw[at+4:at+8]); at += 12+int.from_bytes(raw[at:at+4], 'big')
        assert set(chunks)=={b'IHDR', b'IDAT', b'IEND'}
    row = got.labels.iloc[0]
    assert (row.patient, row['view'], row.side, row.age)==('P0001', 'LAT', 'L', '52')
    assert not re.search(r'20231108|1971', ' '.join(got.labels.astype(str).values.ravel()))
    rejected = pd.read_csv(tmp_path/'out'/'rejects.csv')
    assert f'sha256 {hashlib.sha256(cut.read_bytes()).hexdigest()}' in set(rejected.file)    # whoever holds the file can find it

@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.text('BCDFGHJKLMNPQRSTVWXZ', min_size=6, max_size=20), st.text('0123456789', min_size=9, max_size=16), st.dates().map(lambda d: d.strftime('%Y%m%d')),
       st.lists(st.integers(1, 99999), min_size=5, max_size=8))
def test_no_value_that_names_a_person_survives(tmp_path_factory, name, number, born, uid):
    top = tmp_path_factory.mktemp('person')
    uid = '1.2.826.'+'.'.join(map(str, uid))
    save(top/'in'/name/number, film(noise(1, 8, 8), BitsStored=12, PatientName=f'{name}^{name[::-1]}', PatientID=number, PatientBirthDate=born, StudyDate=born, StudyInstanceUID=uid, SOPInstanceUID=uid,
                                    SeriesDescription=f'{name} AP', OtherPatientNames=name, ViewPosition=name[:16], Laterality=name[:16], BodyPartExamined=name[:16], BurnedInAnnotation=name[:16], PresentationIntentType=name[:16]))
    save(top/'in'/f'{name}.txt', film(noise(2, 8, 8), Modality='MR', PatientName=name))
    import_dicom(top/'in', top/'out')
    for file, raw in files_of(top/'out').items():
        for secret in (name, name[::-1], number, uid, born):
            assert secret not in file and (file.endswith('.png') or secret.encode() not in raw), (file, secret)

def test_patient_numbers_say_nothing_and_stay(tmp_path):
    for k, who in enumerate(('Aaa', 'Bbb', 'Ccc', 'Ddd', 'Eee')): save(tmp_path/'in'/who, film(noise(k), PatientID=who+'77', PatientName=who))
    first = import_dicom(tmp_path/'in', tmp_path/'out').labels
    again = import_dicom(tmp_path/'in', tmp_path/'again').labels
    assert first.equals(again) and sorted(first.patient)==[f'P000{k}' for k in range(1, 6)]
    order = [first.patient[first.sha256==hashlib.sha256(encode_png(read_dicom_image(tmp_path/'in'/w)[0])).hexdigest()].item() for w in ('Aaa', 'Bbb', 'Ccc', 'Ddd', 'Eee')]
    assert order!=sorted(order), 'not in the order of names'

def test_patients_that_share_or_lack_a_number(tmp_path):
    "Everybody ANON: studies tell them apart; no header at all: looks"
    for k, study in enumerate(('1.2.3', '1.2.3', '1.2.4')): save(tmp_path/'in'/f'{k}', film(noise(k), PatientID='ANON', StudyInstanceUID=study))
    a = cv2.GaussianBlur(noise(9, 120, 120), (0, 0), 8)
    save(tmp_path/'in'/'8', film(a)); save(tmp_path/'in'/'9', film((a*.9).astype(np.uint16)))
    got = import_dicom(tmp_path/'in', tmp_path/'out')
    assert got.summary['films']==5 and got.summary['patients']==3

def test_free_text_is_read_for_words_only():
    words = {'ap': 'AP', 'lat': 'LAT'}
    assert [match_single_term(t, words) for t in (['Elbow AP'], ['Elbow AP/LAT'], ['Elbow AP/LAT', 'lat'], ['lateness'], [None, ''])]==['AP', '', 'LAT', '', '']

# ---------------------------------------------------------------- trees that make trouble

def test_files_are_found_by_content(tmp_path):
    save(tmp_path/'in'/'film.txt', film(noise(1)))
    bare = film(noise(2))
    (tmp_path/'in'/'bare').write_bytes(save(tmp_path/'x', bare).read_bytes()[128+4:])       # no preamble, no DICM
    raw = film(noise(3))
    del raw.file_meta
    pydicom.dcmwrite(tmp_path/'in'/'rawest', raw, implicit_vr=True, little_endian=True, enforce_file_format=False)
    (tmp_path/'in'/'not.dcm').write_bytes(b'PK\3\4'+bytes(300)); (tmp_path/'in'/'empty.dcm').touch()
    (tmp_path/'in'/'DICM').write_bytes(bytes(128)+b'DICM'+os.urandom(400))
    got = import_dicom(tmp_path/'in', tmp_path/'out')
    assert got.summary['films']==3
    assert set(got.rejects.file)=={'not.dcm', 'empty.dcm', 'DICM'}
    assert is_dicom(tmp_path/'in'/'rawest') and not is_dicom(tmp_path/'in'/'empty.dcm')

@pytest.mark.parametrize('wrong, reason', [
    (dict(Rows=0), 'damaged'), (dict(Rows=60000, Columns=60000), 'more than'), (dict(NumberOfFrames=3), '3 pictures in one file'), (dict(PhotometricInterpretation='PALETTE COLOR'), 'neither grey'),
    (dict(Rows=4000, Columns=4000), 'damaged: its pixels'), (dict(Modality='PR', SOPClassUID='1.2.840.10008.5.1.4.1.1.11.1'), 'no radiograph: Grayscale Softcopy Presentation State'),
    (dict(BitsAllocated=32, BitsStored=32), 'deeper than 16'), (dict(SamplesPerPixel=7), 'damaged')])
def test_wrong_headers_are_reasons(tmp_path, wrong, reason):
    save(tmp_path/'in'/'bad', film(noise(1), **wrong)); save(tmp_path/'in'/'good', film(noise(2)))
    got = import_dicom(tmp_path/'in', tmp_path/'out')
    assert got.summary['films']==1 and got.rejects.reason[0].startswith(reason), got.rejects.reason[0]

def test_presentation_state_without_picture():
    ds = film(noise(1), Modality='PR', SOPClassUID='1.2.840.10008.5.1.4.1.1.11.1')
    del ds.PixelData
    assert dicom_error(ds).startswith('no picture: Grayscale Softcopy Presentation State')

@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_damaged_files_never_crash(tmp_path_factory, data):
    top = tmp_path_factory.mktemp('damage')
    path = save(top/'a', film(noise(1, 12, 12), BitsStored=12, WindowCenter=[9, 8], WindowWidth=[3, 4], **PERSON))
    raw = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 12))): raw[data.draw(st.integers(132, len(raw)-1))] = data.draw(st.integers(0, 255))
    path.write_bytes(raw[:data.draw(st.integers(100, len(raw)))])
    try: read_dicom_image(path)
    except ValueError as e: assert not re.search('Zweifel|KH-77|1971|1\\.2\\.826', str(e)), e

def test_nothing_to_import(tmp_path):
    (tmp_path/'in').mkdir()
    with pytest.raises(ValueError, match='there is no file that could be one'): import_dicom(tmp_path/'in', tmp_path/'out')
    (tmp_path/'in'/'a').write_text('x')
    with pytest.raises(ValueError, match='1 x no DICOM file'): import_dicom(tmp_path/'in', tmp_path/'out')
    with pytest.raises(FileNotFoundError, match='is no folder'): import_dicom(tmp_path/'nowhere', tmp_path/'out')

def test_names_and_links_that_lead_out(tmp_path):
    write_png(tmp_path/'secret.png', np.full((8, 8), 99, np.uint8)); write_png(tmp_path/'in'/'a.png', noise(1, 8, 8, 255, np.uint8))
    (tmp_path/'in'/'link.png').symlink_to(tmp_path/'secret.png'); (tmp_path/'in'/'loop').symlink_to(tmp_path/'in'); (tmp_path/'in'/'up').symlink_to(tmp_path)
    names = ['a.png', '../secret.png', str(tmp_path/'secret.png'), 'link.png', 'up/secret.png', '..\\secret.png', 'a/../../secret.png', '']
    (tmp_path/'in'/'t.csv').write_text('file,mask,pathology\n'+'\n'.join(f'{n},{"../secret.png" if n=="a.png" else ""},normal' for n in names))
    coco = {'images': [{'id': 1, 'file_name': '../secret.png', 'height': 8, 'width': 8}], 'categories': [{'id': 1, 'name': 'normal'}],
            'annotations': [{'image_id': 1, 'category_id': 1, 'segmentation': [[0, 0, 3, 0, 3, 3]]}]}
    save_json(tmp_path/'coco.json', coco)
    got = import_folder(tmp_path/'in', tmp_path/'out', annotations=tmp_path/'coco.json')
    assert got.labels.file.tolist()==['a.png'] and got.labels['mask'].tolist()==['']
    assert set(p for p in files_of(tmp_path/'out') if p.endswith('.png'))=={'a.png'}
    assert {'../secret.png', 'link.png'}<=set(got.rejects.file)
    assert sum('leaves the folder' in r for r in got.rejects.reason)>=4

@settings(max_examples=100, deadline=None)
@given(st.lists(st.text('aA1._-/ \u00e4\u5c71', min_size=1, max_size=12).map(lambda t: t.strip('/')+'.png'), min_size=1, max_size=8, unique=True))
def test_film_names_are_plain_and_different(files):
    names = unique_names(files)
    assert len({n.lower() for n in names})==len(files) and all(re.fullmatch(r'[A-Za-z0-9._-]+', n) and n[0] not in '.' for n in names)

def test_originals_stay_and_running_again_changes_nothing(tmp_path):
    for k in range(4): save(tmp_path/'in'/f'{k}', film(noise(k), PatientID=str(k+1), ViewPosition='AP', Laterality='L'))
    before = files_of(tmp_path/'in')
    import_dicom(tmp_path/'in', tmp_path/'out', usual={'pathology': 'normal'})
    first, times = files_of(tmp_path/'out'), {p: p.stat().st_mtime_ns for p in (tmp_path/'out').glob('*.png')}
    import_dicom(tmp_path/'in', tmp_path/'out', usual={'pathology': 'normal'})
    assert files_of(tmp_path/'in')==before and files_of(tmp_path/'out')==first
    assert times=={p: p.stat().st_mtime_ns for p in (tmp_path/'out').glob('*.png')}
    assert len(read_labels(tmp_path/'out'))==4 and (tmp_path/'out'/'to_fill.csv').read_text().count('\n')==1
    (tmp_path/'in'/'3').unlink()
    import_dicom(tmp_path/'in', tmp_path/'out', usual={'pathology': 'normal'})
    assert len(list((tmp_path/'out').glob('*.png')))==3 and len(read_labels(tmp_path/'out'))==3       # what the source no longer has goes

def test_a_kill_in_between_leaves_a_folder_that_can_go_on(tmp_path, monkeypatch):
    for k in range(3): write_png(tmp_path/'in'/f'{k}.png', noise(k, top=255, dtype=np.uint8))
    import elbowsynth.data.importers as module
    real_bytes, count = module.write_if_changed, [0]
    def dies(path, raw):
        count[0] += 1
        if count[0]==3: raise KeyboardInterrupt
        real_bytes(path, raw)
    for at in (0, 0, -1):                                                                   # at a film, again at a film, then at the table
        count[0] = at
        monkeypatch.setattr(module, 'keep_bytes', dies)
        with pytest.raises(KeyboardInterrupt): import_folder(tmp_path/'in', tmp_path/'out')
    monkeypatch.setattr(module, 'keep_bytes', real_bytes)
    assert len(import_folder(tmp_path/'in', tmp_path/'out').labels)==3
    assert not [p for p in (tmp_path/'out').rglob('.part*')]

# ---------------------------------------------------------------- layouts

def test_folder_with_labelme_vgg_and_metadata(tmp_path):
    from PIL import Image, PngImagePlugin
    note = PngImagePlugin.PngInfo()
    note.add_text('Patient', 'Zweifel')
    for n in 'ab': Image.fromarray(noise(ord(n), 30, 40, 255, np.uint8)).save((tmp_path/'in'/f'{n}.png').parent.mkdir(exist_ok=True) or tmp_path/'in'/f'{n}.png', pnginfo=note)
    save_json(tmp_path/'in'/'a.json', {'imagePath': 'a.png', 'imageHeight': 30, 'imageWidth': 40, 'shapes': [{'label': 'Joint effusion', 'points': [[0, 0], [20, 15]], 'shape_type': 'rectangle'}]})
    got = import_folder(tmp_path/'in', tmp_path/'out')
    assert got.labels.pathology.tolist()==['joint effusion', ''] and read_image(tmp_path/'out'/got.labels['mask'][0]).mean()/255==.25
    assert not [n for n, raw in files_of(tmp_path/'out').items() if b'Zweifel' in raw]
    (tmp_path/'in'/'a.json').unlink()
    via = {'b.png1': {'filename': 'b.png', 'size': 1, 'regions': [{'shape_attributes': {'name': 'rect', 'x': 0, 'y': 0, 'width': 40, 'height': 15}, 'region_attributes': {'what': 'fx'}}]}}
    save_json(tmp_path/'via.json', via)
    got = import_folder(tmp_path/'in', tmp_path/'out', annotations=tmp_path/'via.json', labels={'fx': 'supracondylar fracture'}, usual={'view': 'AP', 'side': 'L', 'pathology': 'normal'})
    assert read_labels(tmp_path/'out').pathology.tolist()==['normal', 'supracondylar fracture']

def test_private_folder(tmp_path):
    write_png(tmp_path/'in'/'Zweifel Balthasar.png', noise(1)); (tmp_path/'in'/'Quincke.png').write_bytes(b'broken')
    (tmp_path/'in'/'t.csv').write_text('file,patient\nZweifel Balthasar.png,Zweifel\nQuincke.png,Quincke\n')
    got = import_folder(tmp_path/'in', tmp_path/'out', private=True)
    everything = ' '.join(n+raw.decode('latin1') for n, raw in files_of(tmp_path/'out').items())
    assert 'Zweifel' not in everything and 'Quincke' not in everything and got.labels.patient.tolist()==['P0001']

def test_tables_that_contradict_themselves(tmp_path):
    write_png(tmp_path/'in'/'a.png', noise(1))
    (tmp_path/'in'/'t.csv').write_text('file,view\na.png,AP\na.png,LAT\n')
    with pytest.raises(ValueError, match='rows disagree about a.png'): import_folder(tmp_path/'in', tmp_path/'out')
    (tmp_path/'in'/'t.csv').write_text('file,pathology,mask\na.png,normal;joint effusion,a.png\n')
    got = import_folder(tmp_path/'in', tmp_path/'out')
    assert 'a mask for 2 findings' in got.rejects.reason[0]
    (tmp_path/'in'/'u.csv').write_text('x\n')
    with pytest.raises(ValueError, match='say which is the table'): import_folder(tmp_path/'in', tmp_path/'out')

def test_missing_view_is_a_fault_until_it_is_filled_in(tmp_path):
    write_png(tmp_path/'in'/'a.png', noise(1))
    import_folder(tmp_path/'in', tmp_path/'out')
    with pytest.raises(LabelsError): read_labels(tmp_path/'out')
    (tmp_path/'fill.csv').write_text((tmp_path/'out'/'to_fill.csv').read_text().replace('a.png,,,', 'a.png,lateral,right,Joint effusion'))
    import_folder(tmp_path/'in', tmp_path/'out', overrides=tmp_path/'fill.csv')
    assert read_labels(tmp_path/'out')[['view', 'side', 'pathology']].values.tolist()==[['LAT', 'R', 'joint effusion']]

def mura(top, n=3):
    for k in range(n): write_png(top/'train'/'XR_ELBOW'/f'patient{k:05d}'/f'study1_{"negative" if k else "positive"}'/'image1.png', noise(k, top=255, dtype=np.uint8))
    return top

def test_mura_from_the_folder_above_and_without_tables(tmp_path):
    mura(tmp_path/'in'/'MURA-v1.1')
    (tmp_path/'in'/'MURA-v1.1'/'train'/'XR_ELBOW'/'patient00001'/'study1_negative'/'image2.png').write_bytes(b'')
    got = import_mura(tmp_path/'in', tmp_path/'out', usual={'view': 'AP', 'side': 'L'}, labels={'positive': 'joint effusion'})
    assert got.labels.file.tolist()==[f'patient{k:05d}_study1_{"negative" if k else "positive"}_image1.png' for k in range(3)]
    assert len(read_labels(tmp_path/'out'))==3 and len(got.rejects)==1 and (got.labels.licence=='Stanford MURA research use, no redistribution').all()

def test_fracatlas_by_a_list(tmp_path):
    for k, place in enumerate(('Fractured', 'Non_fractured', 'Non_fractured')): (tmp_path/'in'/'images'/place).mkdir(parents=True, exist_ok=True); cv2.imwrite(str(tmp_path/'in'/'images'/place/f'IMG{k}.jpg'), noise(k, 40, 40, 255, np.uint8))
    (tmp_path/'in'/'dataset.csv').write_text('image_id,hand,leg,hip,shoulder,mixed,hardware,multiscan,fractured,fracture_count,frontal,lateral,oblique\n'
                                             'IMG0.jpg,1,0,0,0,0,0,0,1,1,0,1,0\nIMG1.jpg,1,0,0,0,0,0,0,0,0,1,0,0\nIMG2.jpg,0,1,0,0,0,0,0,0,0,1,0,0\n')
    (tmp_path/'in'/'Annotations'/'COCO JSON').mkdir(parents=True)
    coco = {'images': [{'id': 5, 'file_name': 'IMG0.jpg', 'height': 40, 'width': 40}], 'categories': [{'id': 0, 'name': 'fractured'}], 'annotations': [{'image_id': 5, 'category_id': 0, 'segmentation': [[0, 0, 40, 0, 40, 10, 0, 10]]}]}
    save_json(tmp_path/'in'/'Annotations'/'COCO JSON'/'COCO_fracture_masks.json', coco)
    (tmp_path/'elbows.txt').write_text('image\nIMG0.jpg\nIMG1\nIMG9.jpg\n../x.jpg\n')
    got = import_fracatlas(tmp_path/'in', tmp_path/'out', files=tmp_path/'elbows.txt', labels={'fractured': 'supracondylar fracture'})
    assert got.labels[['view', 'pathology']].values.tolist()==[['LAT', 'supracondylar fracture'], ['AP', 'normal']]
    assert read_image(tmp_path/'out'/got.labels['mask'][0]).mean()/255==.25 and set(got.rejects.file)=={'IMG9.jpg', '../x.jpg'}
    save_json(tmp_path/'in'/'Annotations'/'COCO JSON'/'COCO_fracture_masks.json', coco | {'images': [coco['images'][0] | {'width': 50}]})
    got = import_fracatlas(tmp_path/'in', tmp_path/'out', parts=['hand'])
    assert dict(got.rejects.values)['images/Fractured/IMG0.jpg']=='outlines of a film of 40 x 50 pixels, while this one has 40 x 40'

def test_yolo_other_layout_and_names_by_number(tmp_path):
    for p, n in (('train', 'a'), ('val', 'a'), ('val', 'b')): write_png(tmp_path/'in'/'images'/p/f'{n}.png', noise(ord(n)+len(p), top=255, dtype=np.uint8)); (tmp_path/'in'/'labels'/p).mkdir(parents=True, exist_ok=True); (tmp_path/'in'/'labels'/p/f'{n}.txt').write_text('1 .5 .5 1 .5\n0 .25 .5 .5 1\n')
    (tmp_path/'in'/'data.yaml').write_text('names: {0: swelling, 1: fx}\n')
    got = import_yolo(tmp_path/'in', tmp_path/'out', {'swelling': 'soft tissue swelling', 'fx': 'olecranon fracture'})
    assert got.labels.file.nunique()==3 and got.summary['copies dropped']==0 and got.labels.pathology.value_counts().tolist()==[3, 3]     # one name without a hash is no copy
    assert {round(read_image(tmp_path/'out'/m).mean()/255, 2) for m in got.labels['mask']}=={.5} and got.summary['groups']==2

def test_png16_keeps_every_bit(tmp_path):
    deep = noise(3, 40, 50, 65536)
    write_png(tmp_path/'in'/'images_part1'/'s1.png', deep)
    (tmp_path/'in'/'dataset.csv').write_text('filestem,patient_id,laterality,projection,age,pathology\ns1,4,R,2,7.5,joint effusion\n')
    got = import_png16(tmp_path/'in', tmp_path/'out')
    assert np.array_equal(read_image(tmp_path/'out'/'s1.png'), deep) and read_labels(tmp_path/'out').pathology.tolist()==['joint effusion'] and got.labels.age[0]=='7.5'

# ---------------------------------------------------------------- groups

def test_near_copies_are_linked_and_films_are_not():
    from elbowsynth.phantom.phantom import phantom
    films = [phantom('AP' if k%2 else 'LAT', ['normal' if k%3 else 'joint effusion'], side='L', age=4+3*k, seed=100+k, size=192).image for k in range(20)]
    def worse(a): return cv2.imdecode(cv2.imencode('.jpg', cv2.resize((a*.85+15).astype(np.uint8), (140, 140), interpolation=cv2.INTER_AREA), [1, 60])[1], 0)
    looks = np.array([difference_hash(a) for a in films]+[difference_hash(worse(a)) for a in films])
    found = near_duplicate_groups([str(k) for k in range(40)], looks)
    assert found==[str(k) for k in range(20)]*2
    deep = [difference_hash(a.astype(np.uint16)*257) for a in films]
    assert np.array_equal(deep, looks[:20])

@settings(max_examples=50, deadline=None)
@given(st.lists(st.sampled_from('abcde'), min_size=1, max_size=12), st.integers(0, 99))
def test_families_are_what_links_connect(stems, seed):
    rng = np.random.default_rng(seed)
    looks = rng.integers(0, 256, (3, 31), dtype=np.uint8)[rng.integers(0, 3, len(stems))]
    found = near_duplicate_groups(list(stems), looks)
    near = lambda i, j: stems[i]==stems[j] or np.array_equal(looks[i], looks[j])
    reach = np.array([[near(i, j) for j in range(len(stems))] for i in range(len(stems))])
    for _ in stems: reach = reach@reach
    assert all((found[i]==found[j])==reach[i, j] for i in range(len(stems)) for j in range(len(stems)))

# ---------------------------------------------------------------- the command

def test_command(tmp_path, monkeypatch, capsys):
    import elbowsynth.data.importers as module
    mura(tmp_path/'MURA-v1.1')
    done = sh(sys.executable, '-m', 'elbowsynth.data.importers', 'mura', tmp_path/'MURA-v1.1', tmp_path/'out', '--view', 'lateral', '--side', 'left')
    assert '3 films of 3 patients' in done.stdout and 'still missing: pathology of 1' in done.stdout
    done = sh(sys.executable, '-m', 'elbowsynth.data.importers', 'dicom', tmp_path/'MURA-v1.1', tmp_path/'o', check=False)
    assert done.returncode==1 and '3 x no DICOM file' in done.stderr and 'Traceback' not in done.stderr

    def command(*words):
        monkeypatch.setattr(sys, 'argv', ['importers', *map(str, words)])
        module.main()
        return capsys.readouterr().out
    (tmp_path/'fill.csv').write_text('file,pathology\npatient00000_study1_positive_image1.png,joint effusion\n')
    command('mura', tmp_path/'MURA-v1.1', tmp_path/'out', '--view', 'lateral', '--side', 'left', '--overrides', tmp_path/'fill.csv', '--licence', 'mine')
    assert read_labels(tmp_path/'out').pathology.tolist()==['joint effusion', 'normal', 'normal']
    save(tmp_path/'dicom'/'Zweifel', film(noise(1), WindowCenter=[9, 2048], WindowWidth=[9, 4096]))
    (tmp_path/'dicom'/'Quincke').write_text('x')
    assert 'Quincke: no DICOM file' in command('dicom', tmp_path/'dicom', tmp_path/'from_dicom', '--index', 1, '--windows', '--pathology', 'normal')    # told, not written
    assert 'window 2048 4096' in (tmp_path/'from_dicom'/'labels.csv').read_text()
    write_png(tmp_path/'plain'/'a.png', noise(2))
    (tmp_path/'plain'/'t.csv').write_text('bild;befund\na;Erguss\n')
    command('folder', tmp_path/'plain', tmp_path/'from_plain', '--column', 'file=Bild', '--column', 'pathology=Befund', '--label', 'Erguss=joint effusion', '--private')
    assert pd.read_csv(tmp_path/'from_plain'/'labels.csv').pathology.tolist()==['joint effusion']
    for words, message in ((['mura', tmp_path/'nowhere', tmp_path/'o2'], 'is it the folder MURA-v1.1'), (['mura', tmp_path/'MURA-v1.1', tmp_path/'o2', '--index', '1'], 'mura knows no --index'),
                           (['yolo', tmp_path/'MURA-v1.1', tmp_path/'o2'], 'holds no data.yaml'), (['mura', tmp_path/'MURA-v1.1', tmp_path/'o2', '--view', 'oblique'], 'unknown: --view oblique'),
                           (['fracatlas', tmp_path/'MURA-v1.1', tmp_path/'o2'], 'dataset.csv'), (['mura', tmp_path/'MURA-v1.1', tmp_path/'MURA-v1.1'/'o2'], 'lie in one another'),
                           (['folder', tmp_path/'plain', tmp_path/'o2', '--column', 'file=Bild', '--column', 'pathology=Befund'], "1 words that no label maps: 'Erguss'"),
                           (['folder', tmp_path/'MURA-v1.1', tmp_path/'o2', '--overrides', tmp_path/'no.csv'], 'no.csv')):
        with pytest.raises(SystemExit) as stop: command(*words)
        assert message in str(stop.value) and not (tmp_path/'o2'/'labels.csv').exists()

@pytest.mark.skipif(sys.platform!='linux', reason='elsewhere file names are always text')
def test_file_names_that_are_no_text(tmp_path):
    (tmp_path/'in').mkdir()
    for n in (b'h\xe4kchen.png', b'kaputt\xe4.png'): (tmp_path/'in'/os.fsdecode(n)).write_bytes(encode_png(noise(1)) if n.startswith(b'h') else b'')
    got = import_folder(tmp_path/'in', tmp_path/'out')
    assert got.labels.file.tolist()==['h_kchen.png'] and 'kaputt?.png' in (tmp_path/'out'/'rejects.csv').read_text()

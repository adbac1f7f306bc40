"Importers: real radiographs, compression, hostile files, privacy, the command"
import base64, hashlib, json, os, re, shutil, struct, sys
from pathlib import Path
import cv2, numpy as np, pandas as pd, pydicom, pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from conftest import sh
from elbowsynth.core import save_json
from elbowsynth.data.labels import LabelsError, read_labels
from elbowsynth.data.images import read_image, write_png
from elbowsynth.data.annotations import read_shapes
from elbowsynth.data.dicom import (
    apply_voi, dicom_error, display_pixels, import_dicom, is_dicom, match_single_term,
    read_dicom_image, stored_values, voi_table)
from elbowsynth.data.importers import (
    difference_hash, encode_png, import_folder, label_mapping, list_files, near_duplicate_groups,
    unique_names, write_import)
from elbowsynth.data.import_cli import format_summary, parse_label_args
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

PERSON = dict(
    PatientName='Zweifel^Balthasar', PatientID='KH-7741902', PatientBirthDate='19710314',
    StudyDate='20231108', SeriesDate='20231108', StudyTime='142233', AccessionNumber='ACC55120',
    InstitutionName='Kantonsspital Nirgendwo', ReferringPhysicianName='Quincke^Ottilie',
    OperatorsName='Hollerbusch', StationName='RAUM-3-DX',
    StudyInstanceUID='1.2.826.0.1.3680043.8.498.771',
    SeriesInstanceUID='1.2.826.0.1.3680043.8.498.772',
    SOPInstanceUID='1.2.826.0.1.3680043.8.498.773',
    SeriesDescription='Zweifel Ellbogen lateral links', StudyDescription='LEFT elbow of Balthasar',
    PatientComments='fell off a horse', PatientAge='052Y')

def dicom_image(pixels, **tags):
    "A DICOM image built in memory"
    pixels = np.atleast_2d(pixels)
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = '1.2.840.10008.1.2.1'
    ds.file_meta.MediaStorageSOPClassUID = '1.2.840.10008.5.1.4.1.1.1.1'
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID
    ds.SOPInstanceUID = '1.2.826.0.1.3680043.8.498.1'
    ds.Modality, ds.PhotometricInterpretation = 'DX', 'MONOCHROME2'
    ds.SamplesPerPixel = pixels.shape[2] if pixels.ndim==3 else 1
    ds.Rows, ds.Columns = pixels.shape[:2]
    ds.BitsAllocated = ds.BitsStored = 8*pixels.itemsize
    for name, value in tags.items(): setattr(ds, name, value)
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID
    ds.HighBit, ds.PixelRepresentation = ds.BitsStored-1, int(pixels.dtype.kind=='i')
    ds.add_new('PixelData', 'OW', pixels.tobytes()+b'\0'*(pixels.nbytes%2))
    return ds

def save(path, ds):
    path.parent.mkdir(parents=True, exist_ok=True)
    ds.save_as(path, enforce_file_format=True)
    return path

def noise(seed, h=40, w=50, top=4096, dtype=np.uint16):
    return np.random.default_rng(seed).integers(0, top, (h, w)).astype(dtype)

def displayed(ds): return display_pixels(ds)[0]

def files_of(folder):
    "Relative path to contents"
    paths = [p for p in sorted(Path(folder).rglob('*')) if p.is_file()]
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in paths}

# ---------------------------------------------------------------- real radiographs

def test_real_radiographs(tmp_path):
    (tmp_path/'in').mkdir()
    for name in ('RG1_UNCR', 'RG1_J2KR', 'RG3_UNCR', 'RG3_J2KR', 'RG3_J2KI'):
        shutil.copy(real(f'{name}.dcm'), tmp_path/'in'/name)
    result = import_dicom(tmp_path/'in', tmp_path/'out', license='public')
    assert result.summary['n_images']==3 and result.summary['n_patients']==2
    # the losslessly compressed copies have the same pixels
    assert sorted(result.rejects.reason)==['duplicate of another image']*2
    chest = result.labels[result.labels.body_part=='CHEST'].iloc[0]
    leg = result.labels[result.labels.body_part=='EXTREMITY'].iloc[0]
    assert (chest['view'], chest.side, chest.voi_transform)==('AP', '', 'window 15000 30000')
    assert (chest.inverted, chest.pixel_spacing)==('1', '')         # the header states 0 mm
    assert (leg['view'], leg.side, leg.voi_transform)==('AP', 'R', 'window 550 1024')
    assert leg.bit_depth=='16'

    ds = pydicom.dcmread(real('RG3_UNCR.dcm'))
    assert ds.PhotometricInterpretation=='MONOCHROME1' and ds.BitsStored==10
    stored = ds.pixel_array.astype(float)
    # PS3.3 C.11.2.1.2: center 550, width 1024; then inverted
    by_hand = 1-np.clip((stored-549.5)/1023+.5, 0, 1)
    images = [read_image(tmp_path/'out'/f) for f in result.labels.file]
    images = [i for i in images if i.shape==stored.shape]
    image = next(i for i in images if np.abs(i-by_hand*65535).max()<1)
    bone = image[430:470, 790:830].mean()                           # the shaft of the tibia
    air = image[430:470, 480:560].mean()                            # the background beside the leg
    assert bone>4*air, (bone, air)

def test_lossless_and_uncompressed_files_agree():
    pairs = (('RG1_UNCR', 'RG1_J2KR'), ('RG3_UNCR', 'RG3_J2KR'), ('RG1_UNCI', 'RG1_J2KI'))
    for uncompressed, lossless in pairs:
        a = read_dicom_image(real(f'{uncompressed}.dcm'))[0]
        b = read_dicom_image(real(f'{lossless}.dcm'))[0]
        assert np.array_equal(a, b)

def test_all_files_of_pydicom_become_images_or_rejects(tmp_path):
    "CT, MR, ultrasound, reports, several frames, private or broken syntax: never a crash"
    folder = bundled('CT_small.dcm').parent
    result = import_dicom(folder, tmp_path/'out')
    n_files = sum(p.is_file() and not p.name.startswith('.') for p in folder.rglob('*'))
    n_hidden_folders = sum(p.name.startswith('.') for p in folder.rglob('*') if p.is_dir())
    assert len(result.labels)+len(result.rejects)==n_files-n_hidden_folders
    reasons = dict(result.rejects.values)
    assert reasons['reportsi.dcm']=='no pixel data: Basic Text SR Storage'
    assert reasons['CT_small.dcm']=='not a radiograph: CT Image Storage'
    directories = [r for r in reasons.values() if r.startswith('no pixel data: Media Storage Dir')]
    assert directories
    assert reasons['README.txt']=='not a DICOM file'
    assert not re.search(r'\d\.\d+\.\d+', ' '.join(reasons.values())), 'UIDs in reasons'

# ---------------------------------------------------------------- pixel values

def test_compression_keeps_the_pixels():
    wide = dict(BitsStored=12, WindowCenter=2048, WindowWidth=4096)
    compressed = dicom_image(noise(1), **wide)
    compressed.compress('1.2.840.10008.1.2.4.90')                   # JPEG 2000, lossless
    assert np.array_equal(displayed(compressed), displayed(dicom_image(noise(1), **wide)))
    signed = (noise(2).astype(np.int32)-2048).astype(np.int16)
    centered = dict(BitsStored=12, WindowCenter=0, WindowWidth=4096)
    compressed = dicom_image(signed, **centered)
    compressed.compress('1.2.840.10008.1.2.4.90')
    assert np.array_equal(displayed(compressed), displayed(dicom_image(signed, **centered)))

def test_jpeg_ls():
    "By pylibjpeg-libjpeg, signed, 16 bits: a file of pydicom, and its uncompressed original"
    compressed = pydicom.dcmread(bundled('MR_small_jpeg_ls_lossless.dcm'))
    original = pydicom.dcmread(bundled('MR_small.dcm'))
    for ds in (compressed, original): ds.Modality = 'CR'
    syntax = compressed.file_meta.TransferSyntaxUID.name
    assert syntax=='JPEG-LS Lossless Image Compression'
    assert np.array_equal(displayed(compressed), displayed(original))
    assert displayed(original).std()>1000

@pytest.mark.parametrize('bits', [8, 10, 12, 14, 16])
@pytest.mark.parametrize('signed', [False, True])
def test_bit_depths(bits, signed):
    "A window over all values maps them to all gray levels, whatever their depth and sign"
    low = -(1<<bits-1) if signed else 0
    if signed: dtype = np.int8 if bits==8 else np.int16
    else: dtype = np.uint8 if bits==8 else np.uint16
    ramp = np.linspace(low, low+(1<<bits)-1, 200).round().astype(dtype)
    center, width = low+(1<<bits-1), 1<<bits
    ds = dicom_image(ramp, BitsStored=bits, WindowCenter=center, WindowWidth=width)
    image = displayed(ds).ravel()
    top = 255 if bits==8 else 65535
    assert np.array_equal(image, np.rint((ramp.astype(float)-low)/((1<<bits)-1)*top))
    assert image.dtype==(np.uint8 if bits==8 else np.uint16)

@settings(max_examples=60, deadline=None)
@given(st.integers(-500, 4500), st.integers(2, 5000), st.sampled_from([.5, 1, 2, 3.25]),
       st.integers(-1024, 200), st.booleans(),
       st.sampled_from(['LINEAR', 'LINEAR_EXACT', 'SIGMOID']))
def test_windows_agree_with_pydicom(center, width, slope, intercept, inverse, function):
    photometric = 'MONOCHROME1' if inverse else 'MONOCHROME2'
    ds = dicom_image(noise(3, 8, 9), BitsStored=12, WindowCenter=center, WindowWidth=width,
                     RescaleSlope=slope, RescaleIntercept=intercept, VOILUTFunction=function,
                     PhotometricInterpretation=photometric)
    theirs = apply_voi_lut(apply_modality_lut(ds.pixel_array, ds), ds)
    low, high = intercept, 4095*slope+intercept
    unit = (theirs-low)/(high-low)
    if inverse: unit = 1-unit
    assert np.abs(displayed(ds)/65535-unit).max()<1e-4

def test_modality_lut_before_window():
    ds = dicom_image(np.uint8([0, 1, 2, 3, 200]), WindowCenter=500.5, WindowWidth=1001)
    lut = Dataset()
    lut.LUTDescriptor, lut.ModalityLUTType = [4, 0, 16], 'US'
    lut.add_new('LUTData', 'US', [0, 250, 500, 1000])
    ds.ModalityLUTSequence = [lut]
    # a quarter, a half, all, and beyond the table its last entry
    assert displayed(ds).ravel().tolist()==[0, 64, 128, 255, 255]

@pytest.mark.parametrize('bits', [8, 10, 12, 16])
@pytest.mark.parametrize('representation', ['US', 'OW'])
def test_voi_tables(bits, representation):
    table = ((np.arange(1024)/1023)**2*((1<<bits)-1)).astype(int)
    entries = table.tolist()
    data = entries if representation=='US' else struct.pack('<1024H', *entries)
    ds, lut = dicom_image(noise(4, 6, 7, 1200), BitsStored=12), Dataset()
    lut.LUTDescriptor = [1024, 50, bits]
    lut.add_new('LUTData', representation, data)
    ds.VOILUTSequence = [lut]
    by_hand = table[np.clip(ds.pixel_array.astype(int)-50, 0, 1023)]
    assert np.array_equal(apply_voi(ds)[0], by_hand)
    assert np.array_equal(displayed(ds), np.rint(by_hand/((1<<bits)-1)*65535))
    if bits>8: assert np.array_equal(apply_voi_lut(ds.pixel_array, ds), by_hand) # pydicom agrees

def test_voi_table_of_bytes_in_words():
    lut = Dataset()
    lut.LUTDescriptor, lut.LUTData = [4, 10, 8], bytes([1, 2, 3, 250])
    values = voi_table(np.array([0, 10, 11, 12, 13, 99]), lut)[0]
    assert values.tolist()==[1, 1, 2, 3, 250, 250]

def test_pydicom_still_misreads_8bit_tables():
    "When this fails, pydicom looks VOI tables up correctly and `voi_table` can be removed"
    ds, lut = dicom_image(np.uint16([1000]), BitsStored=12), Dataset()
    lut.LUTDescriptor = [4096, 0, 8]
    lut.add_new('LUTData', 'US', [i//16 for i in range(4096)])
    ds.VOILUTSequence = [lut]
    assert apply_voi_lut(ds.pixel_array, ds).tolist()!=[[62]]
    assert displayed(ds).tolist()==[[round(62/255*65535)]]

def test_an_image_is_inverted_once():
    ramp, window = np.uint8([0, 100, 255]), dict(WindowCenter=128, WindowWidth=256)
    monochrome1 = {'PhotometricInterpretation': 'MONOCHROME1'}
    inverse = {'PresentationLUTShape': 'INVERSE'}
    assert displayed(dicom_image(ramp, **window)).ravel().tolist()==[0, 100, 255]
    for tags in (monochrome1, inverse, monochrome1 | inverse):
        assert displayed(dicom_image(ramp, **window, **tags)).ravel().tolist()==[255, 155, 0]

def test_padding_is_black():
    signed = dicom_image(np.int16([-2000, -2000, -100, 0, 100]), PixelPaddingValue=-2000,
                         PhotometricInterpretation='MONOCHROME1')
    assert displayed(signed).ravel().tolist()==[0, 0, 65535, 32768, 0]
    with_range = dicom_image(np.uint16([0, 3, 10, 20]), PixelPaddingValue=0,
                             PixelPaddingRangeLimit=3)
    assert displayed(with_range).ravel().tolist()==[0, 0, 0, 65535]
    all_padding = dicom_image(np.uint16([7, 7]), PixelPaddingValue=7)
    assert displayed(all_padding).max()==0                          # a constant image, no crash

def test_shutter_is_black():
    ramp = np.arange(1, 21, dtype=np.uint8).reshape(4, 5)
    shutter = dict(ShutterShape='RECTANGULAR', ShutterUpperHorizontalEdge=2,
                   ShutterLowerHorizontalEdge=3, ShutterLeftVerticalEdge=2,
                   ShutterRightVerticalEdge=4)
    image = displayed(dicom_image(ramp, PhotometricInterpretation='MONOCHROME1', **shutter))
    # the highest value of the exposed part is the darkest
    assert (image>0).astype(int).tolist()==[[0]*5, [0, 1, 1, 1, 0], [0, 1, 1, 0, 0], [0]*5]
    hides_all = shutter | {'ShutterUpperHorizontalEdge': 9}         # ignored
    assert displayed(dicom_image(ramp, **hides_all)).max()==255

def test_overlays_are_not_burned_in():
    ds = pydicom.dcmread(bundled('examples_overlay.dcm'))
    ds.Modality = 'DX'
    before = displayed(ds)
    assert 0x60000010 in ds
    for tag in [t for t in ds.keys() if t.group & 0xff00==0x6000]: del ds[tag]
    assert np.array_equal(displayed(ds), before)
    # an overlay in a bit that the stored values leave free
    in_free_bit = noise(5) | np.uint16(0x8000)*(noise(6)%2)
    wide = dict(BitsStored=12, WindowCenter=2048, WindowWidth=4096)
    assert np.array_equal(displayed(dicom_image(in_free_bit, **wide)),
                          displayed(dicom_image(noise(5), **wide)))

SYNTAXES = {'explicit': '1.2.840.10008.1.2.1', 'big endian': '1.2.840.10008.1.2.2',
            'deflated': '1.2.840.10008.1.2.1.99', 'RLE': '1.2.840.10008.1.2.5',
            'JPEG 2000': '1.2.840.10008.1.2.4.90', 'JPEG 2000 lossy': '1.2.840.10008.1.2.4.91'}

def with_a_name(path, syntax, signed, low_bit=0, **compression):
    "A file of 12 bits with a name in an unused bit, as read, and its values without the name"
    clean = noise(5, 60, 200).astype(np.int64)-2048*signed
    name = cv2.putText(np.zeros((60, 200), np.uint8), 'ZWEIFEL', (5, 40), 0, 1, 1, 3).astype(bool)
    assert name.sum()>500
    bits = (clean & 4095)<<low_bit                                  # two's complement in 12 bits
    bits |= name.astype(np.int64)<<(15 if not low_bit else 1)
    container = bits.astype(np.uint16).view(np.int16 if signed else np.uint16)
    ds = dicom_image(container)
    ds.file_meta.TransferSyntaxUID = SYNTAXES[syntax]
    if syntax=='big endian': ds.PixelData = container.byteswap().tobytes()
    if syntax not in ('explicit', 'big endian', 'deflated'):
        ds.file_meta.TransferSyntaxUID = SYNTAXES['explicit']
        ds.compress(SYNTAXES[syntax], encoding_plugin='', **compression)
    ds.BitsStored, ds.HighBit = 12, 11+low_bit
    ds.WindowCenter, ds.WindowWidth = 2048-2048*signed, 4096
    return pydicom.dcmread(save(path, ds)), clean

@pytest.mark.parametrize('signed', [0, 1])
@pytest.mark.parametrize('syntax', ['explicit', 'big endian', 'deflated', 'RLE', 'JPEG 2000'])
def test_a_name_in_unused_bits_is_removed_for_every_transfer_syntax(tmp_path, syntax, signed):
    ds, clean = with_a_name(tmp_path/'in'/'a', syntax, signed)
    by_hand = np.rint((clean+2048*signed)/4095*65535)
    assert np.array_equal(displayed(ds), by_hand)
    result = import_dicom(tmp_path/'in', tmp_path/'out')
    assert np.array_equal(read_image(tmp_path/'out'/result.labels.file[0]), by_hand)
    assert result.labels.masked_bits.tolist()==['1']                # reported, not silent
    assert result.summary['n_masked_bits']==1

@pytest.mark.parametrize('signed', [0, 1])
@pytest.mark.parametrize('syntax', ['explicit', 'big endian', 'deflated', 'RLE'])
def test_unused_bits_may_lie_below_those_stored(tmp_path, syntax, signed):
    "HighBit 15 of 12 stored bits: the lowest four are not part of the image"
    ds, clean = with_a_name(tmp_path/'a', syntax, signed, low_bit=4)
    assert np.array_equal(displayed(ds), np.rint((clean+2048*signed)/4095*65535))

def test_bits_that_cannot_be_separated_are_rejected(tmp_path):
    with_a_name(tmp_path/'in'/'shifted', 'JPEG 2000', 0, low_bit=4)
    with_a_name(tmp_path/'in'/'lossy', 'JPEG 2000 lossy', 0, j2k_cr=[4])
    save(tmp_path/'in'/'good', dicom_image(noise(1)))
    rgb = np.zeros((6, 6, 3), np.uint8)
    color = dict(PhotometricInterpretation='RGB', PlanarConfiguration=0, Modality='OT')
    save(tmp_path/'in'/'color', dicom_image(rgb, BitsStored=7, **color))
    result = import_dicom(tmp_path/'in', tmp_path/'out')
    reasons = dict(result.rejects.values)
    assert list(reasons)==['color', 'lossy', 'shifted'] and result.summary['n_images']==1
    assert 'bits outside of BitsStored, lossily compressed' in reasons['lossy']
    assert reasons['shifted'].startswith('HighBit')
    assert reasons['color'].startswith('bit depth not supported')

@pytest.mark.parametrize('name', ['MR_small_jpeg_ls_lossless', 'MR_small_RLE',
                                  'MR_small_jp2klossless', 'MR_small'])
@pytest.mark.parametrize('bits', [6, 9, 11])
def test_bits_stored_limit_the_values_of_real_files(name, bits):
    "JPEG-LS is not encoded here: a file of 16 bits whose header states fewer"
    original = pydicom.dcmread(bundled('MR_small.dcm'))
    pixels = np.frombuffer(original.PixelData, '<i2').reshape(64, 64).astype(int)
    by_hand = pixels % (1<<bits)
    by_hand = np.where(by_hand>=1<<bits-1, by_hand-(1<<bits), by_hand)
    ds = pydicom.dcmread(bundled(f'{name}.dcm'))
    ds.BitsStored, ds.HighBit = bits, bits-1
    values, is_foreign = stored_values(ds)
    assert np.array_equal(values, by_hand)
    assert np.array_equal(is_foreign, (pixels!=by_hand) & (pixels!=by_hand % (1<<bits)))

@pytest.mark.parametrize('dtype', [np.uint8, np.int8, np.uint16, np.int16, np.uint32])
def test_each_unused_bit_of_each_container_is_found(dtype):
    "Five bits of a container of 8, 16 or 32: values, two's complement, and each bit above"
    width, is_signed = 8*np.dtype(dtype).itemsize, np.dtype(dtype).kind=='i'
    bits = [5, 27, 5 | 1<<5, 5 | 1<<width-1, 27 | ((1<<width)-1)<<5 & (1<<width)-1]
    pixels = np.array(bits, f'u{width//8}').view(dtype)
    values, is_foreign = stored_values(dicom_image(pixels, BitsStored=5))
    negative = 27-32 if is_signed else 27
    assert values.tolist()==[[5, negative, 5, 5, negative]]
    # all upper bits set are the sign of a negative number
    assert is_foreign.tolist()==[[False, False, True, True, not is_signed]]

def test_lossless_jpeg_is_limited_to_the_bits_stored():
    path = real('JPEG-LL.dcm')                                      # process 14, 16 bits, signed
    pixels = pydicom.dcmread(path).pixel_array.astype(int)
    assert pixels.max()>255
    ds = pydicom.dcmread(path)
    ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 5, 4, 0
    assert np.array_equal(stored_values(ds)[0], pixels % 32)

def test_more_frames_in_the_pixels_than_in_the_header_are_rejected(tmp_path):
    ds = pydicom.dcmread(bundled('emri_small_RLE.dcm'))             # ten frames
    ds.NumberOfFrames, ds.Modality = 1, 'DX'
    with pytest.raises(ValueError, match='pixels of .10, 64, 64., expected .64, 64.'):
        read_dicom_image(save(tmp_path/'a', ds))

def test_what_the_decoder_warns_of_is_counted(tmp_path):
    ds = dicom_image(noise(1))
    ds.PixelData += bytes(30)                                       # excess padding
    save(tmp_path/'in'/'long', ds)
    save(tmp_path/'in'/'good', dicom_image(noise(2)))
    result = import_dicom(tmp_path/'in', tmp_path/'out')
    assert sorted(result.labels.decoder_warning)==['0', '1']
    assert result.summary['n_decoder_warning']==1

def test_color_stays_and_gray_in_three_channels_becomes_one():
    rgb = np.zeros((6, 6, 3), np.uint8)
    rgb[1:3] = 200, 30, 10
    tags = dict(PhotometricInterpretation='RGB', PlanarConfiguration=0, Modality='OT')
    assert np.array_equal(displayed(dicom_image(rgb, **tags)), rgb)
    assert displayed(dicom_image(rgb[..., :1].repeat(3, 2), **tags)).shape==(6, 6)
    decoded = cv2.imdecode(np.frombuffer(encode_png(rgb), np.uint8), cv2.IMREAD_COLOR)
    assert np.array_equal(decoded[..., ::-1], rgb)

def test_invalid_windows_are_ignored():
    assert apply_voi(dicom_image(noise(7), WindowCenter=100, WindowWidth=0))[3].startswith('range')
    empty = dicom_image(noise(7))
    empty.WindowCenter = empty.WindowWidth = None
    assert apply_voi(empty)[3].startswith('range')

# ---------------------------------------------------------------- privacy

def png_chunks(raw):
    "Types of the chunks of a PNG file"
    at, chunks = 8, []
    while at<len(raw):
        chunks.append(raw[at+4:at+8])
        at += 12+int.from_bytes(raw[at:at+4], 'big')
    return set(chunks)

def test_nothing_identifies_the_patient(tmp_path):
    for k in range(3):
        tags = PERSON | {'SOPInstanceUID': f'1.2.826.0.1.3680043.8.498.77{k}'}
        ds = dicom_image(noise(k), BitsStored=12, **tags)
        ds.add_new(0x00091010, 'LO', 'Zweifel private')
        save(tmp_path/'in'/'Zweifel_Balthasar_19710314'/f'1.2.826.0.1.3680043.8.498.77{k}', ds)
    save(tmp_path/'in'/'Zweifel report', dicom_image(noise(9), Modality='CT', **PERSON))
    (tmp_path/'in'/'Zweifel.txt').write_text('Balthasar')
    truncated = save(tmp_path/'in'/'Zweifel cut', dicom_image(noise(8), **PERSON))
    truncated.write_bytes(truncated.read_bytes()[:-1000])
    result = import_dicom(tmp_path/'in', tmp_path/'out')
    assert result.summary['n_images']==3 and result.summary['n_patients']==1
    assert len(result.rejects)==3

    values = [str(v) for v in PERSON.values() if v!='052Y']
    words = re.findall(r'[A-Za-z]{5,}', ' '.join(map(str, PERSON.values())))
    secrets = [*values, *words, '1.2.826', str(tmp_path)]
    secrets = [s for s in secrets if s.lower() not in ('lateral', 'elbow')]
    for name, raw in files_of(tmp_path/'out').items():
        for secret in secrets:
            assert secret.lower() not in name.lower()
            for encoding in ('utf-8', 'utf-16-le'):
                assert secret.encode(encoding) not in raw, (name, secret)
                assert secret.lower().encode(encoding) not in raw.lower(), (name, secret)
    for path in (tmp_path/'out').glob('*.png'):                     # size and pixels, nothing else
        assert png_chunks(path.read_bytes())=={b'IHDR', b'IDAT', b'IEND'}

    row = result.labels.iloc[0]
    assert (row.patient, row['view'], row.side, row.age)==('P0001', 'LAT', 'L', '52')
    cells = ' '.join(result.labels.astype(str).values.ravel())
    assert not re.search(r'20231108|1971', cells)
    rejected = pd.read_csv(tmp_path/'out'/'rejects.csv')
    file_hash = hashlib.sha256(truncated.read_bytes()).hexdigest()
    assert f'sha256 {file_hash}' in set(rejected.file)              # the owner can find the file

@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.text('BCDFGHJKLMNPQRSTVWXZ', min_size=6, max_size=20),
       st.text('0123456789', min_size=9, max_size=16),
       st.dates().map(lambda d: d.strftime('%Y%m%d')),
       st.lists(st.integers(1, 99999), min_size=5, max_size=8))
def test_no_identifying_value_is_written(tmp_path_factory, name, number, born, uid):
    top = tmp_path_factory.mktemp('person')
    uid = '1.2.826.'+'.'.join(map(str, uid))
    short_name = name[:16]
    ds = dicom_image(
        noise(1, 8, 8), BitsStored=12, PatientName=f'{name}^{name[::-1]}', PatientID=number,
        PatientBirthDate=born, StudyDate=born, StudyInstanceUID=uid, SOPInstanceUID=uid,
        SeriesDescription=f'{name} AP', OtherPatientNames=name, ViewPosition=short_name,
        Laterality=short_name, BodyPartExamined=short_name, BurnedInAnnotation=short_name,
        PresentationIntentType=short_name)
    save(top/'in'/name/number, ds)
    save(top/'in'/f'{name}.txt', dicom_image(noise(2, 8, 8), Modality='MR', PatientName=name))
    import_dicom(top/'in', top/'out')
    for file, raw in files_of(top/'out').items():
        for secret in (name, name[::-1], number, uid, born):
            assert secret not in file, (file, secret)
            assert file.endswith('.png') or secret.encode() not in raw, (file, secret)

def test_patient_numbers_are_stable_and_not_in_the_order_of_names(tmp_path):
    names = ('Aaa', 'Bbb', 'Ccc', 'Ddd', 'Eee')
    for k, name in enumerate(names):
        save(tmp_path/'in'/name, dicom_image(noise(k), PatientID=name+'77', PatientName=name))
    first = import_dicom(tmp_path/'in', tmp_path/'out').labels
    again = import_dicom(tmp_path/'in', tmp_path/'again').labels
    assert first.equals(again) and sorted(first.patient)==[f'P000{k}' for k in range(1, 6)]
    order = []
    for name in names:
        png = encode_png(read_dicom_image(tmp_path/'in'/name)[0])
        order.append(first.patient[first.sha256==hashlib.sha256(png).hexdigest()].item())
    assert order!=sorted(order), 'in the order of names'

def test_patients_with_a_placeholder_or_no_number(tmp_path):
    "All called ANON: distinguished by their studies; no header at all: by similarity"
    for k, study in enumerate(('1.2.3', '1.2.3', '1.2.4')):
        save(tmp_path/'in'/f'{k}', dicom_image(noise(k), PatientID='ANON', StudyInstanceUID=study))
    image = cv2.GaussianBlur(noise(9, 120, 120), (0, 0), 8)
    save(tmp_path/'in'/'8', dicom_image(image))
    save(tmp_path/'in'/'9', dicom_image((image*.9).astype(np.uint16)))
    result = import_dicom(tmp_path/'in', tmp_path/'out')
    assert result.summary['n_images']==5 and result.summary['n_patients']==3

def test_free_text_is_searched_for_terms_only():
    aliases = {'ap': 'AP', 'lat': 'LAT'}
    texts = [['Elbow AP'], ['Elbow AP/LAT'], ['Elbow AP/LAT', 'lat'], ['lateness'], [None, '']]
    assert [match_single_term(t, aliases) for t in texts]==['AP', '', 'LAT', '', '']

# ---------------------------------------------------------------- difficult folders

def test_dicom_files_are_recognized_by_content(tmp_path):
    save(tmp_path/'in'/'image.txt', dicom_image(noise(1)))
    with_preamble = save(tmp_path/'x', dicom_image(noise(2))).read_bytes()
    (tmp_path/'in'/'bare').write_bytes(with_preamble[128+4:])       # no preamble, no DICM
    raw = dicom_image(noise(3))
    del raw.file_meta
    pydicom.dcmwrite(tmp_path/'in'/'rawest', raw, implicit_vr=True, little_endian=True,
                     enforce_file_format=False)
    (tmp_path/'in'/'not.dcm').write_bytes(b'PK\3\4'+bytes(300))
    (tmp_path/'in'/'empty.dcm').touch()
    (tmp_path/'in'/'DICM').write_bytes(bytes(128)+b'DICM'+os.urandom(400))
    result = import_dicom(tmp_path/'in', tmp_path/'out')
    assert result.summary['n_images']==3
    assert set(result.rejects.file)=={'not.dcm', 'empty.dcm', 'DICM'}
    assert is_dicom(tmp_path/'in'/'rawest') and not is_dicom(tmp_path/'in'/'empty.dcm')

PRESENTATION_STATE = dict(Modality='PR', SOPClassUID='1.2.840.10008.5.1.4.1.1.11.1')

@pytest.mark.parametrize('wrong, reason', [
    (dict(Rows=0), 'damaged'),
    (dict(Rows=60000, Columns=60000), 'more than'),
    (dict(NumberOfFrames=3), '3 frames in one file'),
    (dict(PhotometricInterpretation='PALETTE COLOR'), 'neither gray'),
    (dict(Rows=4000, Columns=4000), 'damaged: its pixels'),
    (PRESENTATION_STATE, 'not a radiograph: Grayscale Softcopy Presentation State'),
    (dict(BitsAllocated=32, BitsStored=32), 'bit depth not supported: more than 16'),
    (dict(SamplesPerPixel=7), 'damaged')])
def test_invalid_headers_are_rejected(tmp_path, wrong, reason):
    save(tmp_path/'in'/'bad', dicom_image(noise(1), **wrong))
    save(tmp_path/'in'/'good', dicom_image(noise(2)))
    result = import_dicom(tmp_path/'in', tmp_path/'out')
    assert result.summary['n_images']==1
    assert result.rejects.reason[0].startswith(reason), result.rejects.reason[0]

def test_presentation_state_without_pixels():
    ds = dicom_image(noise(1), **PRESENTATION_STATE)
    del ds.PixelData
    assert dicom_error(ds).startswith('no pixel data: Grayscale Softcopy Presentation State')

@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_damaged_files_never_crash(tmp_path_factory, data):
    top = tmp_path_factory.mktemp('damage')
    ds = dicom_image(noise(1, 12, 12), BitsStored=12, WindowCenter=[9, 8], WindowWidth=[3, 4],
                     **PERSON)
    path = save(top/'a', ds)
    raw = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 12))):
        position = data.draw(st.integers(132, len(raw)-1))
        raw[position] = data.draw(st.integers(0, 255))
    path.write_bytes(raw[:data.draw(st.integers(100, len(raw)))])
    try: read_dicom_image(path)
    except ValueError as e: assert not re.search('Zweifel|KH-77|1971|1\\.2\\.826', str(e)), e

def test_nothing_to_import(tmp_path):
    (tmp_path/'in').mkdir()
    with pytest.raises(ValueError, match='no candidate files'):
        import_dicom(tmp_path/'in', tmp_path/'out')
    (tmp_path/'in'/'a').write_text('x')
    with pytest.raises(ValueError, match='1 x not a DICOM file'):
        import_dicom(tmp_path/'in', tmp_path/'out')
    with pytest.raises(FileNotFoundError, match='is not a folder'):
        import_dicom(tmp_path/'nowhere', tmp_path/'out')

def test_paths_and_links_that_leave_the_folder(tmp_path):
    secret = tmp_path/'secret.png'
    write_png(secret, np.full((8, 8), 99, np.uint8))
    write_png(tmp_path/'in'/'a.png', noise(1, 8, 8, 255, np.uint8))
    (tmp_path/'in'/'link.png').symlink_to(secret)
    (tmp_path/'in'/'loop').symlink_to(tmp_path/'in')
    (tmp_path/'in'/'up').symlink_to(tmp_path)
    names = ['a.png', '../secret.png', str(secret), 'link.png', 'up/secret.png', '..\\secret.png',
             'a/../../secret.png', '']
    rows = [f'{n},{"../secret.png" if n=="a.png" else ""},normal' for n in names]
    (tmp_path/'in'/'t.csv').write_text('\n'.join(['file,mask,pathology', *rows]))
    polygon = {'image_id': 1, 'category_id': 1, 'segmentation': [[0, 0, 3, 0, 3, 3]]}
    coco = {'images': [{'id': 1, 'file_name': '../secret.png', 'height': 8, 'width': 8}],
            'categories': [{'id': 1, 'name': 'normal'}], 'annotations': [polygon]}
    save_json(tmp_path/'coco.json', coco)
    result = import_folder(tmp_path/'in', tmp_path/'out', annotations=tmp_path/'coco.json')
    assert result.labels.file.tolist()==['a.png'] and result.labels['mask'].tolist()==['']
    assert {name for name in files_of(tmp_path/'out') if name.endswith('.png')}=={'a.png'}
    assert {'../secret.png', 'link.png'}<=set(result.rejects.file)
    assert sum('leaves the folder' in r for r in result.rejects.reason)>=4

FILE_NAMES = st.text('aA1._-/ \u00e4\u5c71', min_size=1, max_size=12)

@settings(max_examples=100, deadline=None)
@given(st.lists(FILE_NAMES.map(lambda t: t.strip('/')+'.png'), min_size=1, max_size=8, unique=True))
def test_image_names_are_portable_and_unique(files):
    names = unique_names(files)
    assert len({n.lower() for n in names})==len(files)
    assert all(re.fullmatch(r'[A-Za-z0-9._-]+', n) and n[0] not in '.' for n in names)

def test_the_source_is_unchanged_and_a_second_import_changes_nothing(tmp_path):
    for k in range(4):
        ds = dicom_image(noise(k), PatientID=str(k+1), ViewPosition='AP', Laterality='L')
        save(tmp_path/'in'/f'{k}', ds)
    def run(): import_dicom(tmp_path/'in', tmp_path/'out', defaults={'pathology': 'normal'})
    def times(): return {p: p.stat().st_mtime_ns for p in (tmp_path/'out').glob('*.png')}
    before = files_of(tmp_path/'in')
    run()
    first, first_times = files_of(tmp_path/'out'), times()
    run()
    assert files_of(tmp_path/'in')==before and files_of(tmp_path/'out')==first
    assert first_times==times()
    assert len(read_labels(tmp_path/'out'))==4
    assert (tmp_path/'out'/'missing_labels.csv').read_text().count('\n')==1
    (tmp_path/'in'/'3').unlink()
    run()                                                           # removes what the source lost
    assert len(list((tmp_path/'out').glob('*.png')))==3 and len(read_labels(tmp_path/'out'))==3

def test_an_interrupted_import_can_be_repeated(tmp_path, monkeypatch):
    for k in range(3): write_png(tmp_path/'in'/f'{k}.png', noise(k, top=255, dtype=np.uint8))
    import elbowsynth.data.importers as module
    original, count = module.write_if_changed, [0]
    def interrupted(path, raw):
        count[0] += 1
        if count[0]==3: raise KeyboardInterrupt
        original(path, raw)
    for start in (0, 0, -1): # twice at an image, then at a table
        count[0] = start
        monkeypatch.setattr(module, 'write_if_changed', interrupted)
        with pytest.raises(KeyboardInterrupt): import_folder(tmp_path/'in', tmp_path/'out')
    monkeypatch.setattr(module, 'write_if_changed', original)
    assert len(import_folder(tmp_path/'in', tmp_path/'out').labels)==3
    assert not [p for p in (tmp_path/'out').rglob('.part*')]

# ---------------------------------------------------------------- layouts

def test_folder_with_labelme_vgg_and_metadata(tmp_path):
    from PIL import Image, PngImagePlugin
    metadata = PngImagePlugin.PngInfo()
    metadata.add_text('Patient', 'Zweifel')
    (tmp_path/'in').mkdir()
    for name in 'ab':
        image = Image.fromarray(noise(ord(name), 30, 40, 255, np.uint8))
        image.save(tmp_path/'in'/f'{name}.png', pnginfo=metadata)
    rectangle = {'label': 'Joint effusion', 'points': [[0, 0], [20, 15]], 'shape_type': 'rectangle'}
    labelme = {'imagePath': 'a.png', 'imageHeight': 30, 'imageWidth': 40, 'shapes': [rectangle]}
    save_json(tmp_path/'in'/'a.json', labelme)
    result = import_folder(tmp_path/'in', tmp_path/'out')
    assert result.labels.pathology.tolist()==['joint effusion', '']
    assert read_image(tmp_path/'out'/result.labels['mask'][0]).mean()/255==.25
    assert not [n for n, raw in files_of(tmp_path/'out').items() if b'Zweifel' in raw]

    (tmp_path/'in'/'a.json').unlink()
    rectangle = {'name': 'rect', 'x': 0, 'y': 0, 'width': 40, 'height': 15}
    region = {'shape_attributes': rectangle, 'region_attributes': {'what': 'fx'}}
    via = {'b.png1': {'filename': 'b.png', 'size': 1, 'regions': [region]}}
    save_json(tmp_path/'via.json', via)
    import_folder(tmp_path/'in', tmp_path/'out', annotations=tmp_path/'via.json',
                  labels={'fx': 'supracondylar fracture'},
                  defaults={'view': 'AP', 'side': 'L', 'pathology': 'normal'})
    labels = read_labels(tmp_path/'out')
    assert labels.pathology.tolist()==['normal', 'supracondylar fracture']

def test_deidentified_folder(tmp_path):
    write_png(tmp_path/'in'/'Zweifel Balthasar.png', noise(1))
    (tmp_path/'in'/'Quincke.png').write_bytes(b'broken')
    rows = ['file,patient', 'Zweifel Balthasar.png,Zweifel', 'Quincke.png,Quincke']
    (tmp_path/'in'/'t.csv').write_text('\n'.join(rows)+'\n')
    result = import_folder(tmp_path/'in', tmp_path/'out', deidentify=True)
    written = ' '.join(n+raw.decode('latin1') for n, raw in files_of(tmp_path/'out').items())
    assert 'Zweifel' not in written and 'Quincke' not in written
    assert result.labels.patient.tolist()==['P0001']

def test_deidentified_reasons_do_not_name_masks(tmp_path):
    write_png(tmp_path/'in'/'a.png', noise(1))
    write_png(tmp_path/'in'/'b.png', noise(2))
    (tmp_path/'in'/'Zweifel mask.png').write_bytes(b'')
    rows = ['file,pathology,mask', 'a.png,normal,Zweifel mask.png', 'b.png,normal,']
    (tmp_path/'in'/'t.csv').write_text('\n'.join(rows)+'\n')
    result = import_folder(tmp_path/'in', tmp_path/'out', deidentify=True)
    assert dict(result.rejects.values)=={'a.png': 'its mask cannot be read: it is empty'}
    assert not [n for n, raw in files_of(tmp_path/'out').items() if b'Zweifel' in raw]

def test_contradictory_tables(tmp_path):
    write_png(tmp_path/'in'/'a.png', noise(1))
    (tmp_path/'in'/'t.csv').write_text('file,view\na.png,AP\na.png,LAT\n')
    with pytest.raises(ValueError, match='rows disagree about a.png'):
        import_folder(tmp_path/'in', tmp_path/'out')
    (tmp_path/'in'/'t.csv').write_text('file,pathology,mask\na.png,normal;joint effusion,a.png\n')
    result = import_folder(tmp_path/'in', tmp_path/'out')
    assert 'one mask for 2 findings' in result.rejects.reason[0]
    (tmp_path/'in'/'u.csv').write_text('x\n')
    with pytest.raises(ValueError, match='specify the table'):
        import_folder(tmp_path/'in', tmp_path/'out')

def test_missing_labels_are_errors_until_they_are_filled_in(tmp_path):
    write_png(tmp_path/'in'/'a.png', noise(1))
    import_folder(tmp_path/'in', tmp_path/'out')
    with pytest.raises(LabelsError): read_labels(tmp_path/'out')
    missing = (tmp_path/'out'/'missing_labels.csv').read_text()
    filled = missing.replace('a.png,,,', 'a.png,lateral,right,Joint effusion')
    (tmp_path/'fill.csv').write_text(filled)
    import_folder(tmp_path/'in', tmp_path/'out', overrides=tmp_path/'fill.csv')
    labels = read_labels(tmp_path/'out')[['view', 'side', 'pathology']]
    assert labels.values.tolist()==[['LAT', 'R', 'joint effusion']]

def write_mura(top, n=3):
    for k in range(n):
        study = f'study1_{"negative" if k else "positive"}'
        path = top/'train'/'XR_ELBOW'/f'patient{k:05d}'/study/'image1.png'
        write_png(path, noise(k, top=255, dtype=np.uint8))
    return top

def test_mura_from_the_parent_folder_and_without_tables(tmp_path):
    mura = write_mura(tmp_path/'in'/'MURA-v1.1')
    empty = mura/'train'/'XR_ELBOW'/'patient00001'/'study1_negative'/'image2.png'
    empty.write_bytes(b'')
    result = import_mura(tmp_path/'in', tmp_path/'out', defaults={'view': 'AP', 'side': 'L'},
                         labels={'positive': 'joint effusion'})
    studies = ['study1_positive', 'study1_negative', 'study1_negative']
    names = [f'patient{k:05d}_{study}_image1.png' for k, study in enumerate(studies)]
    assert result.labels.file.tolist()==names
    assert len(read_labels(tmp_path/'out'))==3 and len(result.rejects)==1
    assert (result.labels.license=='Stanford MURA research use, no redistribution').all()

def test_fracatlas_by_a_list(tmp_path):
    source = tmp_path/'in'
    for k, folder in enumerate(('Fractured', 'Non_fractured', 'Non_fractured')):
        (source/'images'/folder).mkdir(parents=True, exist_ok=True)
        path = source/'images'/folder/f'IMG{k}.jpg'
        cv2.imwrite(str(path), noise(k, 40, 40, 255, np.uint8))
    rows = ['image_id,hand,leg,hip,shoulder,mixed,hardware,multiscan,fractured,fracture_count,'
            'frontal,lateral,oblique',
            'IMG0.jpg,1,0,0,0,0,0,0,1,1,0,1,0',
            'IMG1.jpg,1,0,0,0,0,0,0,0,0,1,0,0',
            'IMG2.jpg,0,1,0,0,0,0,0,0,0,1,0,0']
    (source/'dataset.csv').write_text('\n'.join(rows)+'\n')
    coco_path = source/'Annotations'/'COCO JSON'/'COCO_fracture_masks.json'
    coco_path.parent.mkdir(parents=True)
    image = {'id': 5, 'file_name': 'IMG0.jpg', 'height': 40, 'width': 40}
    polygon = [0, 0, 40, 0, 40, 10, 0, 10]
    coco = {'images': [image], 'categories': [{'id': 0, 'name': 'fractured'}],
            'annotations': [{'image_id': 5, 'category_id': 0, 'segmentation': [polygon]}]}
    save_json(coco_path, coco)
    (tmp_path/'elbows.txt').write_text('image\nIMG0.jpg\nIMG1\nIMG9.jpg\n../x.jpg\n')
    result = import_fracatlas(source, tmp_path/'out', files=tmp_path/'elbows.txt',
                              labels={'fractured': 'supracondylar fracture'})
    labels = result.labels[['view', 'pathology']].values.tolist()
    assert labels==[['LAT', 'supracondylar fracture'], ['AP', 'normal']]
    assert read_image(tmp_path/'out'/result.labels['mask'][0]).mean()/255==.25
    assert set(result.rejects.file)=={'IMG9.jpg', '../x.jpg'}

    save_json(coco_path, coco | {'images': [image | {'width': 50}]})
    result = import_fracatlas(source, tmp_path/'out', body_parts=['hand'])
    reason = dict(result.rejects.values)['images/Fractured/IMG0.jpg']
    assert reason=='annotated at 40 x 50 pixels, but the image has 40 x 40'

def test_yolo_other_layout_and_names_by_number(tmp_path):
    source = tmp_path/'in'
    for subset, name in (('train', 'a'), ('val', 'a'), ('val', 'b')):
        image = noise(ord(name)+len(subset), top=255, dtype=np.uint8)
        write_png(source/'images'/subset/f'{name}.png', image)
        (source/'labels'/subset).mkdir(parents=True, exist_ok=True)
        (source/'labels'/subset/f'{name}.txt').write_text('1 .5 .5 1 .5\n0 .25 .5 .5 1\n')
    (source/'data.yaml').write_text('names: {0: swelling, 1: fx}\n')
    classes = {'swelling': 'soft tissue swelling', 'fx': 'olecranon fracture'}
    result = import_yolo(source, tmp_path/'out', classes)
    assert result.labels.file.nunique()==3
    assert result.summary['n_augmented_copies_dropped']==0          # equal names alone do not count
    assert result.labels.pathology.value_counts().tolist()==[3, 3]
    areas = {round(read_image(tmp_path/'out'/m).mean()/255, 2) for m in result.labels['mask']}
    assert areas=={.5} and result.summary['n_groups']==2

def test_png16_keeps_all_bits(tmp_path):
    deep = noise(3, 40, 50, 65536)
    write_png(tmp_path/'in'/'images_part1'/'s1.png', deep)
    rows = ['filestem,patient_id,laterality,projection,age,pathology',
            's1,4,R,2,7.5,joint effusion']
    (tmp_path/'in'/'dataset.csv').write_text('\n'.join(rows)+'\n')
    result = import_png16(tmp_path/'in', tmp_path/'out')
    assert np.array_equal(read_image(tmp_path/'out'/'s1.png'), deep)
    assert read_labels(tmp_path/'out').pathology.tolist()==['joint effusion']
    assert result.labels.age[0]=='7.5'

# ---------------------------------------------------------------- what a file states is kept

def write_yolo(source, yaml, labels, shape=(40, 40)):
    "A YOLO data set: names of images to the text of their label files"
    for k, (name, text) in enumerate(labels.items()):
        write_png(source/'images'/f'{name}.png', noise(k, *shape, 255, np.uint8))
        path = source/'labels'/f'{name}.txt'
        path.parent.mkdir(parents=True, exist_ok=True)
        if text is not None: path.write_text(text)
    (source/'data.yaml').write_text(yaml)
    return source

FX, FLUID = 'olecranon fracture', 'joint effusion'
CLASSES = {'fx': FX, 'fluid': FLUID}

@pytest.mark.parametrize('names, index', [
    ('{1: fx, 2: fluid}', 1), ("{'0': fluid, '1': fx}", 1), ('{1: fx, 0: fluid}', 1),
    ("{'10': fx, '9': fluid}", 10), ('[fluid, fx]', 1)])
def test_yolo_names_belong_to_the_numbers_that_are_stated(tmp_path, names, index):
    source = write_yolo(tmp_path/'in', f'names: {names}\nnc: 2\n', {'a': f'{index} .5 .5 .5 .5'})
    assert import_yolo(source, tmp_path/'out', CLASSES).labels.pathology.tolist()==[FX]

@pytest.mark.parametrize('yaml, message', [
    ('names: [fx, fluid]\nnc: 3', 'nc is 3, but 2 classes are named'),
    ('names: {0: fx, 1: fluid, 1: fx}', 'two entries of one name'),
    ("names: {0: fx, 1: fluid, '1': fx}", 'class 1 has 2 names'),
    ('names: {a: fx}', "class numbers 'a'"), ('names: [fx]\nkpt_shape: 3', 'kpt_shape is 3'),
    ('nc: 1', 'has no names'), ('names: [fx', 'cannot be read')])
def test_contradictory_yolo_configurations_are_refused(tmp_path, yaml, message):
    source = write_yolo(tmp_path/'in', yaml, {'a': '0 .5 .5 .5 .5'})
    with pytest.raises(ValueError, match=message): import_yolo(source, tmp_path/'out', CLASSES)

def test_a_yolo_class_that_is_not_named_rejects_its_image(tmp_path):
    labels = {'a': '0 .5 .5 .5 .5', 'b': '1 .5 .5 .5 .5', 'c': '1.5 .5 .5 .5 .5'}
    source = write_yolo(tmp_path/'in', 'names: {1: fx, 2: fluid}', labels)
    result = import_yolo(source, tmp_path/'out', CLASSES)
    assert result.labels.file.tolist()==['b.png']
    reasons = dict(result.rejects.values)
    assert 'line 1: class 0 is not named; named are 1, 2' in reasons['images/a.png']
    assert 'number of a class' in reasons['images/c.png']

def test_key_points_are_no_polygons(tmp_path):
    "A box over the left half, and four key points, as two or three values each"
    pairs = ' .9 .9'*4
    labels = {'a': '0 .25 .5 .5 1'+pairs, 'b': '0 .25 .5 .5 1', 'c': '0 .25 .5 .5 1'+' .9 .9 2'*4}
    source = write_yolo(tmp_path/'in', 'names: [fx]\nkpt_shape: [4, 2]', labels)
    result = import_yolo(source, tmp_path/'out', CLASSES)
    assert result.labels.file.tolist()==['a.png']
    mask = read_image(tmp_path/'out'/result.labels['mask'][0])>0
    assert mask[:, :20].all() and not mask[:, 20:].any()
    assert all('8 of key points' in reason for reason in result.rejects.reason)
    (source/'data.yaml').write_text('names: [fx]')                  # kpt_shape is missing
    result = import_yolo(source, tmp_path/'out', CLASSES)
    assert 'kpt_shape' in dict(result.rejects.values)['images/c.png']

def test_oriented_boxes_cover_their_corners(tmp_path):
    source = write_yolo(tmp_path/'in', 'names: [fx]', {'a': '0 .5 0 1 .5 .5 1 0 .5'})
    result = import_yolo(source, tmp_path/'out', CLASSES)
    mask = read_image(tmp_path/'out'/result.labels['mask'][0])>0
    rows, columns = np.mgrid[:40, :40]+.5
    distance = abs(rows-20)+abs(columns-20)
    assert mask[distance<20].all() and not mask[distance>20].any()

def test_class_names_keep_their_lines(tmp_path):
    "An empty line in classes.txt is a class without a name, not a reason to renumber"
    write_png(tmp_path/'a.png', noise(1))
    (tmp_path/'notes').mkdir()
    (tmp_path/'notes'/'classes.txt').write_text('cast\n\nfx\n\n')
    (tmp_path/'notes'/'a.txt').write_text('2 .5 .5 .5 .5\n')
    assert [s['label'] for s in read_shapes(tmp_path/'notes', tmp_path)]==['fx']

# ---------------------------------------------------------------- faults belong to their image

SQUARE = [5, 5, 25, 5, 25, 25, 5, 25]

def write_coco(folder, annotations, images=(), categories=()):
    "Two images of 40 x 40 pixels, and a COCO file"
    names = {1: 'a.png', 2: 'b.png'}
    for k, name in names.items():
        write_png(folder/'in'/name, noise(k, 40, 40, 255, np.uint8))
    listed = [{'id': k, 'file_name': n, 'height': 40, 'width': 40} for k, n in names.items()]
    classes = [{'id': 1, 'name': 'fx'}, {'id': 2, 'name': 'fluid'}, {'id': 3, 'name': 'text'}]
    save_json(folder/'coco.json', {'images': listed+list(images), 'annotations': annotations,
                                   'categories': classes+list(categories)})
    return folder/'in'

def import_coco(folder, **labels):
    label_map = CLASSES | {'text': None} | labels
    return import_folder(folder/'in', folder/'out', annotations=folder/'coco.json',
                         labels=label_map)

VALID = {'id': 1, 'image_id': 2, 'category_id': 1, 'segmentation': [SQUARE]}
COCO_FAULTS = [
    ({'segmentation': [[]]}, 'an outline of 0 numbers'),
    ({'segmentation': SQUARE}, 'one flat list'),
    ({'segmentation': [SQUARE[:5]]}, 'an outline of 5 numbers'),
    ({'segmentation': [[1, 2, 3, 'x', 5, 6]]}, 'not a list of numbers'),
    ({}, 'neither an outline nor a box'), ({'segmentation': [], 'bbox': []}, 'neither an outline'),
    ({'bbox': [1, 2, 3]}, 'its box is'), ({'bbox': [1, 2, 0, 5]}, 'its box is'),
    ({'segmentation': {'size': [40, 40], 'counts': [10, -1]}}, 'is negative'),
    ({'segmentation': {'size': [40, 40], 'counts': [9]}}, 'runs of 9 pixels, expected 40 x 40'),
    ({'segmentation': {'size': [20, 80], 'counts': [1600]}}, 'run lengths for .20, 80.'),
    ({'segmentation': {'size': [40, 40]}}, 'it has no counts'),
    ({'segmentation': [[90, 90, 99, 90, 99, 99]]}, 'without a pixel in the image'),
    ({'category_id': 77, 'bbox': [1, 1, 5, 5]}, 'one of which the file does not list')]

@pytest.mark.parametrize('fault, reason', COCO_FAULTS)
def test_a_faulty_coco_annotation_costs_its_image_only(tmp_path, fault, reason):
    faulty = {'id': 2, 'image_id': 1, 'category_id': 2} | fault
    write_coco(tmp_path, [VALID, faulty])
    result = import_coco(tmp_path)
    assert result.labels[['file', 'pathology']].values.tolist()==[['b.png', FX]]
    assert result.rejects.file.tolist()==['a.png']
    assert re.search(reason, result.rejects.reason[0]), result.rejects.reason[0]
    if 'category_id' in fault: return
    # category 3 is not wanted, so its geometry does not matter
    fluid = VALID | {'id': 3, 'image_id': 1, 'category_id': 2}
    write_coco(tmp_path, [fluid, VALID, faulty | {'category_id': 3}])
    result = import_coco(tmp_path)
    assert not len(result.rejects)
    assert result.labels[['file', 'pathology']].values.tolist()==[['a.png', FLUID], ['b.png', FX]]

@pytest.mark.parametrize('same, reason', [
    ({'images': [{'id': 1, 'file_name': 'c.png', 'height': 40, 'width': 40}]},
     'image id 1 is stated for several images: a.png, c.png'),
    ({'categories': [{'id': 2, 'name': 'fx'}]},
     'category id 2 is stated for several categories: fluid, fx'),
    ({'annotations': [{'id': 2, 'image_id': 1, 'category_id': 1, 'segmentation': [SQUARE]}]},
     'its id is that of another annotation')])
def test_ids_that_are_stated_twice_reject_their_images(tmp_path, same, reason):
    "The last of two images, categories or annotations of one id is no better than the first"
    ambiguous = {'id': 2, 'image_id': 1, 'category_id': 2, 'segmentation': [SQUARE]}
    write_coco(tmp_path, [VALID, ambiguous, *same.pop('annotations', [])], **same)
    write_png(tmp_path/'in'/'c.png', noise(9, 40, 40, 255, np.uint8))
    result = import_coco(tmp_path)
    rejected = ['a.png', 'c.png'] if 'images' in same else ['a.png']
    assert result.rejects.file.tolist()==rejected and reason in result.rejects.reason[0]
    assert result.labels[result.labels.pathology==FX].file.tolist()==['b.png']

def test_a_coco_annotation_of_no_image_and_images_without_a_file_are_counted(tmp_path):
    lost = {'id': 9, 'file_name': 'lost.png', 'height': 40, 'width': 40}
    write_coco(tmp_path, [VALID, VALID | {'id': 2, 'image_id': 77}], images=[lost])
    result = import_coco(tmp_path)
    reason = 'annotation: no such image in the folder'
    assert dict(result.rejects.values)=={'lost.png': reason, 'image id 77': reason}
    assert len(result.labels)==2                                    # a.png has no annotation

def labelme(shape, **changes):
    content = {'imagePath': 'a.png', 'imageHeight': 40, 'imageWidth': 40, 'shapes': [shape]}
    return json.dumps(content | changes)

BOX = {'label': 'fx', 'shape_type': 'rectangle', 'points': [[5, 5], [25, 25]]}
LABELME_FAULTS = [
    (labelme(BOX | {'shape_type': 'point', 'points': [[3, 3]]}), 'a point of 1 points, which has'),
    (labelme(BOX | {'shape_type': 'linestrip'}), 'a linestrip of 2 points, which has no area'),
    (labelme(BOX | {'shape_type': 'mask', 'mask': 'AAAA'}), 'its mask cannot be decoded'),
    (labelme(BOX | {'shape_type': 'mask', 'mask': None}), 'its mask cannot be decoded'),
    (labelme(BOX | {'points': [[1, 2], [3]]}), 'a point is not an x and a y'),
    (labelme(BOX | {'points': None}), 'its points are not a list'),
    (labelme({'label': 'fx'}), 'it has no points'), (labelme('x'), 'in another format')]

@pytest.mark.parametrize('text, reason', LABELME_FAULTS+[
    ('{"foo": 1}', 'its JSON file has no shapes, imagePath'),
    ('{"shapes": ', 'its JSON file is not a JSON file'), ('[1]', 'its JSON file holds no'),
    (labelme(BOX, imagePath='b.png'), 'of another image'), (labelme(BOX, shapes=3), 'not a list')])
def test_a_faulty_labelme_file_costs_its_image_only(tmp_path, text, reason):
    for k, name in enumerate('ab'):
        write_png(tmp_path/'in'/f'{name}.png', noise(k, 40, 40, 255, np.uint8))
    (tmp_path/'in'/'a.json').write_text(text)
    (tmp_path/'in'/'b.json').write_text(labelme(BOX, imagePath='b.png'))
    result = import_folder(tmp_path/'in', tmp_path/'out', labels=CLASSES)
    assert result.labels[['file', 'pathology']].values.tolist()==[['b.png', FX]]
    assert result.rejects.file.tolist()==['a.png'] and reason in result.rejects.reason[0]

def test_a_labelme_shape_that_is_not_wanted_may_have_any_geometry(tmp_path):
    write_png(tmp_path/'in'/'a.png', noise(1, 40, 40, 255, np.uint8))
    shapes = [json.loads(text)['shapes'][0] for text, _ in LABELME_FAULTS[:6]]
    shapes = [shape | {'label': 'text'} for shape in shapes]+[BOX]
    (tmp_path/'in'/'a.json').write_text(labelme(BOX, shapes=shapes))
    result = import_folder(tmp_path/'in', tmp_path/'out', labels=CLASSES | {'text': None})
    assert result.labels.pathology.tolist()==[FX] and not len(result.rejects)
    assert (read_image(tmp_path/'out'/result.labels['mask'][0])>0).sum()==400

def test_masks_of_labelme_are_read(tmp_path):
    write_png(tmp_path/'in'/'a.png', noise(1, 40, 40, 255, np.uint8))
    ring = np.ones((6, 9), np.uint8)
    ring[2:4, 3:7] = 0
    png = base64.b64encode(encode_png(ring)).decode()
    shape = {'label': 'fx', 'shape_type': 'mask', 'points': [[10, 20], [18, 25]], 'mask': png}
    (tmp_path/'in'/'a.json').write_text(labelme(shape))
    result = import_folder(tmp_path/'in', tmp_path/'out', labels=CLASSES)
    expected = np.zeros((40, 40), bool)
    expected[20:26, 10:19] = ring>0
    assert np.array_equal(read_image(tmp_path/'out'/result.labels['mask'][0])>0, expected)

def test_labelme_files_without_an_image_and_of_two_images_of_one_name(tmp_path):
    for k, name in enumerate(('a.png', 'a.jpg')):
        image = cv2.imencode(name[1:], noise(k, 40, 40, 255, np.uint8))[1]
        (tmp_path/'in').mkdir(exist_ok=True)
        (tmp_path/'in'/name).write_bytes(image.tobytes())
    (tmp_path/'in'/'a.json').write_text(labelme(BOX))
    (tmp_path/'in'/'lost.json').write_text(labelme(BOX, imagePath='lost.png'))
    (tmp_path/'in'/'settings.json').write_text('{}')
    result = import_folder(tmp_path/'in', tmp_path/'out', labels=CLASSES)
    pathologies = dict(zip(result.labels.source, result.labels.pathology))
    assert pathologies=={'a.jpg': '', 'a.png': FX}
    lost = [['lost.json', 'annotation: no such image in the folder']]
    assert result.rejects.values.tolist()==lost

def write_via(folder, regions, name='a.png'):
    write_png(folder/'in'/'a.png', noise(1, 40, 40, 255, np.uint8))
    write_png(folder/'in'/'b.png', noise(2, 40, 40, 255, np.uint8))
    images = {'a': {'filename': name, 'size': 1, 'regions': regions},
              'b': {'filename': 'b.png', 'size': 1, 'regions': [region()]}}
    save_json(folder/'via.json', images)

def region(shape=(), **attributes):
    box = {'name': 'rect', 'x': 5, 'y': 5, 'width': 20, 'height': 20}
    return {'shape_attributes': shape or box, 'region_attributes': attributes or {'type': 'fx'}}

@pytest.mark.parametrize('faulty, reason', [
    (region({'name': 'point', 'cx': 1, 'cy': 2}), 'a point has no area'),
    (region({'name': 'rect', 'x': 1}), 'it has no y'),
    (region({'name': 'circle', 'cx': 'x', 'cy': 1, 'r': 2}), 'not a list of numbers'),
    (region({'name': 'polygon', 'all_points_x': [1, 2, 3], 'all_points_y': [1]}), 'many x as y'),
    (region({'name': 'rect', 'x': 300, 'y': 300, 'width': 9, 'height': 9}), 'leaves the image'),
    ({'shape_attributes': {}}, 'no attribute type'), (region(type=3), 'is not a text'),
    ('x', 'region 1')])
def test_a_faulty_via_region_costs_its_image_only(tmp_path, faulty, reason):
    write_via(tmp_path, [faulty])
    result = import_folder(tmp_path/'in', tmp_path/'out', labels=CLASSES,
                           annotations=tmp_path/'via.json')
    assert result.labels[['file', 'pathology']].values.tolist()==[['b.png', FX]]
    assert result.rejects.file.tolist()==['a.png'] and reason in result.rejects.reason[0]

def test_the_attribute_of_via_can_be_named(tmp_path, monkeypatch):
    import elbowsynth.data.import_cli as module
    write_via(tmp_path, [region(type='fx', reader='Zweifel')])
    words = ['folder', tmp_path/'in', tmp_path/'out', '--annotations', tmp_path/'via.json',
             '--label', f'fx={FX}']
    monkeypatch.setattr(sys, 'argv', ['import_cli', *map(str, words)])
    with pytest.raises(SystemExit) as stop: module.main()
    message = str(stop.value)
    assert 'attributes reader (1), type (2)' in message and '--attribute NAME' in message
    sys.argv += ['--attribute', 'type']
    module.main()
    assert pd.read_csv(tmp_path/'out'/'labels.csv').pathology.tolist()==[FX, FX]

def test_two_entries_of_one_name_in_a_json_file_are_refused(tmp_path):
    write_via(tmp_path, [region()])
    text = (tmp_path/'via.json').read_text().replace('"b":', '"a":')
    (tmp_path/'via.json').write_text(text)
    with pytest.raises(ValueError, match='two entries of one name: a'):
        import_folder(tmp_path/'in', tmp_path/'out', annotations=tmp_path/'via.json')

def test_a_faulty_yolo_line_costs_its_image_only(tmp_path):
    lines = {'a': '0 .5 .5', 'b': '0 .5 .5 .5 .5', 'c': '0 5 5 20 20', 'd': '0 nan .5 .5 .5',
             'e': '0 .5 .5 0 .5', 'f': '2 .5 .5\n0 .5 .5 .5 .5'}
    source = write_yolo(tmp_path/'in', 'names: [fx, fluid, text]', lines)
    result = import_yolo(source, tmp_path/'out', CLASSES | {'text': None})
    assert result.labels.file.tolist()==['b.png', 'f.png']          # text is not wanted
    assert result.rejects.file.tolist()==[f'images/{name}.png' for name in 'acde']
    assert 'not a fraction of the image' in result.rejects.reason[1]

def test_reasons_of_deidentified_yolo_images_name_no_file(tmp_path):
    source = write_yolo(tmp_path/'in', 'names: [fx]', {'a': '0 .5 .5 .5 .5', 'Zweifel': '0 .5'})
    (source/'labels'/'Quincke.txt').write_text('0 .5 .5 .5 .5')
    result = import_yolo(source, tmp_path/'out', CLASSES, deidentify=True)
    (source/'labels'/'Zweifel.txt').write_bytes(b'0 \xff')
    import_yolo(source, tmp_path/'again', CLASSES, deidentify=True)
    assert len(result.rejects)==2
    for folder in ('out', 'again'):
        assert not [n for n, raw in files_of(tmp_path/folder).items()
                    if b'Zweifel' in raw or b'Quincke' in raw]

# ---------------------------------------------------------------- nothing is lost uncounted

def test_yolo_files_without_a_partner_are_counted(tmp_path):
    source = write_yolo(tmp_path/'in', 'names: [fx]', {'a': '0 .5 .5 .5 .5', 'b': None})
    (source/'labels'/'lost.txt').write_text('0 .5 .5 .5 .5')
    (source/'labels'/'classes.txt').write_text('fx')
    write_png(source/'preview.png', noise(9))
    result = import_yolo(source, tmp_path/'out', CLASSES)
    assert dict(result.rejects.values)=={'labels/lost.txt': 'a label file without an image',
                                         'preview.png': 'not in a folder images'}
    assert result.summary['n_without_label_file']==1

def test_mura_studies_without_images_and_without_a_label_are_counted(tmp_path):
    mura = write_mura(tmp_path/'in'/'MURA-v1.1')
    write_png(mura/'train'/'XR_ELBOW'/'patient00009'/'study1_unclear'/'image1.png', noise(1))
    rows = [f'MURA-v1.1/train/XR_ELBOW/patient{k:05d}/study1_negative/,0' for k in (1, 2, 88)]
    (mura/'train_labeled_studies.csv').write_text('\n'.join(rows))
    rejects = dict(import_mura(tmp_path/'in', tmp_path/'out').rejects.values)
    assert rejects=={
        'train/XR_ELBOW/patient00088/study1_negative': 'listed in a table, but without images',
        'train/XR_ELBOW/patient00009/study1_unclear/image1.png':
            'its study is neither positive nor negative'}

def test_fracatlas_rows_and_images_without_a_partner_are_counted(tmp_path):
    header = 'image_id,hand,hardware,multiscan,fractured,frontal'
    rows = [header, 'A.jpg,1,0,0,0,1', 'B.jpg,1,0,0,0,1', 'B.jpg,1,0,0,1,1', 'lost.jpg,1,0,0,0,1']
    (tmp_path/'in'/'images').mkdir(parents=True)
    for k, name in enumerate('ABC'):
        cv2.imwrite(str(tmp_path/'in'/'images'/f'{name}.jpg'), noise(k, 40, 40, 255, np.uint8))
    (tmp_path/'in'/'dataset.csv').write_text('\n'.join(rows))
    path = tmp_path/'in'/'Annotations'/'COCO JSON'/'COCO_fracture_masks.json'
    path.parent.mkdir(parents=True)
    annotation = {'image_id': 1, 'category_id': 0, 'segmentation': [SQUARE]}
    save_json(path, {'images': [{'id': 1, 'file_name': 'gone.jpg'}], 'annotations': [annotation],
                     'categories': [{'id': 0, 'name': 'fractured'}]})
    result = import_fracatlas(tmp_path/'in', tmp_path/'out', body_parts=['hand'])
    assert dict(result.rejects.values)=={
        'images/B.jpg': '2 rows in the table', 'images/C.jpg': 'not listed in the table',
        'lost.jpg': 'no such image in the folder',
        'gone.jpg': 'annotation: no such image in the folder'}
    (tmp_path/'list.txt').write_text('A\nC.jpg\n')                 # no header
    result = import_fracatlas(tmp_path/'in', tmp_path/'out', files=tmp_path/'list.txt')
    assert result.labels.file.tolist()==['A.png']
    assert dict(result.rejects.values)['images/C.jpg']=='not listed in the table'

def test_png16_rows_that_differ_or_state_no_number_reject_their_image(tmp_path):
    rows = ['filename,fracture_visible,metal', 'a,1,', 'b,1,0', 'b,,1', 'c,maybe,']
    for k, name in enumerate('abc'): write_png(tmp_path/'in'/f'{name}.png', noise(k))
    (tmp_path/'in'/'dataset.csv').write_text('\n'.join(rows))
    result = import_png16(tmp_path/'in', tmp_path/'out', labels={'fracture': FX})
    assert result.labels[['file', 'pathology', 'hardware']].values.tolist()==[['a.png', FX, '0']]
    reasons = dict(result.rejects.values)
    assert reasons=={'b.png': 'several rows in the table, which differ',
                     'c.png': "fracture_visible is 'maybe', expected 0 or 1"}

def test_images_of_all_formats_are_listed(tmp_path):
    (tmp_path/'in').mkdir()
    for k, suffix in enumerate(('webp', 'pgm', 'png')):
        image = cv2.imencode(f'.{suffix}', noise(k, 40, 40, 255, np.uint8))[1]
        (tmp_path/'in'/f'{k}.{suffix}').write_bytes(image.tobytes())
    assert len(import_folder(tmp_path/'in', tmp_path/'out').labels)==3

def test_names_in_the_unicode_form_of_macos_are_found(tmp_path):
    composed, decomposed = 'h\u00e4.png', 'ha\u0308.png'
    write_png(tmp_path/'in'/decomposed, noise(1, 40, 40, 255, np.uint8))
    write_png(tmp_path/'in'/'m'/decomposed, np.full((40, 40), 255, np.uint8))
    table = f'file,pathology,mask\n{composed},{FX},m\\{composed}\n'
    (tmp_path/'in'/'t.csv').write_text(table, encoding='utf-8')
    (tmp_path/'fill.csv').write_text(f'file,view\n{composed},AP\n', encoding='utf-8')
    result = import_folder(tmp_path/'in', tmp_path/'out', overrides=tmp_path/'fill.csv')
    assert not len(result.rejects) and result.summary['n_masks']==1
    assert result.labels['view'].tolist()==['AP']

def test_overrides_by_two_names_of_an_image_are_refused(tmp_path):
    write_png(tmp_path/'in'/'x'/'a.png', noise(1))
    (tmp_path/'fill.csv').write_text('file,view\nx/a.png,AP\na.png,LAT\n')
    with pytest.raises(ValueError, match='by their path and by their imported name, too: a.png'):
        import_folder(tmp_path/'in', tmp_path/'out', overrides=tmp_path/'fill.csv')

def test_options_and_labels_that_contradict_each_other_are_refused():
    parsed = parse_label_args(['fx=normal', 'fx = normal', 'x=-'])
    assert parsed=={'fx': 'normal', 'x': None}
    with pytest.raises(ValueError, match="'fx' is given twice"):
        parse_label_args(['fx=normal', f'fx={FX}'])
    with pytest.raises(ValueError, match="labels maps 'big fx' twice"):
        label_mapping(['big fx'], {'big_fx': FX, 'Big fx': FLUID})

@pytest.mark.parametrize('table', [
    'file,view,side,view\na.png,AP,L,LAT\n', 'file,patient_id,Patient ID\na.png,1,2\n'])
def test_two_columns_of_one_name_are_refused(tmp_path, table):
    write_png(tmp_path/'in'/'a.png', noise(1))
    (tmp_path/'in'/'dataset.csv').write_text(table)
    for importer in (import_folder, import_png16):
        with pytest.raises(ValueError, match='view|may both be the patient'):
            importer(tmp_path/'in', tmp_path/'out')

def test_the_age_in_a_deidentified_table_is_at_most_90(tmp_path):
    for k, name in enumerate('abc'): write_png(tmp_path/'in'/f'{name}.png', noise(k))
    rows = ['file,age', 'a.png,97', 'b.png,8.5', 'c.png,born 1931']
    (tmp_path/'in'/'t.csv').write_text('\n'.join(rows))
    result = import_folder(tmp_path/'in', tmp_path/'out', deidentify=True)
    assert sorted(result.labels.age)==['', '8.5', '90']
    assert '97' not in (tmp_path/'out'/'labels.csv').read_text().split(',')
    assert sorted(import_folder(tmp_path/'in', tmp_path/'named').labels.age)[1]=='97'

def test_names_that_a_spreadsheet_would_run_are_escaped(tmp_path):
    for name in ('=1+1', '-x'): write_png(tmp_path/'in'/f'{name}.png', noise(len(name)))
    (tmp_path/'in'/'@SUM.png').write_bytes(b'')
    for _ in range(2):                                              # the second finds the first
        result = import_folder(tmp_path/'in', tmp_path/'out')
    assert sorted(result.labels.source)==['-x.png', '=1+1.png']
    for name in ('labels', 'rejects', 'missing_labels'):
        rows = (tmp_path/'out'/f'{name}.csv').read_text().splitlines()
        cells = [cell for row in rows for cell in row.split(',')]
        assert not [cell for cell in cells if cell[:1] in tuple('=+-@')], name
    (tmp_path/'fill.csv').write_text("file,view\n'=1+1.png,AP\n")
    result = import_folder(tmp_path/'in', tmp_path/'out', overrides=tmp_path/'fill.csv')
    assert sorted(result.labels['view'])==['', 'AP']
    assert len(list((tmp_path/'out').glob('*.png')))==2

def test_duplicates_with_other_labels_are_named_as_such(tmp_path):
    for name in 'abc': write_png(tmp_path/'in'/f'{name}.png', noise(1))
    rows = ['file,patient,pathology', f'a.png,1,{FX}', f'b.png,1,{FX}', f'c.png,1,{FLUID}']
    (tmp_path/'in'/'t.csv').write_text('\n'.join(rows))
    reasons = import_folder(tmp_path/'in', tmp_path/'out', deidentify=True).rejects.reason.tolist()
    assert reasons[0]=='duplicate of another image' and 'another patient, view' in reasons[1]

# ---------------------------------------------------------------- who is who

MIA = dict(PatientName='Muster^Mia', PatientBirthDate='20160229')

@pytest.mark.parametrize('one, other, n, n_candidates', [
    (dict(PatientID='00712'), dict(PatientID='712'), 1, 0),
    (dict(PatientID='MRN-12a'), dict(PatientID='mrn_12A'), 1, 0),
    (dict(PatientID='712', IssuerOfPatientID='KSB'), dict(PatientID='712'), 1, 0),
    (dict(PatientID='712^^^KSB'), dict(PatientID='712'), 1, 0),
    (dict(PatientID='712', IssuerOfPatientID='KSB'),
     dict(PatientID='712', IssuerOfPatientID='ksb'), 1, 0),
    (dict(PatientID='712', IssuerOfPatientID='KSB'),
     dict(PatientID='712', IssuerOfPatientID='USZ'), 2, 1),
    (dict(PatientID='1', **MIA), dict(PatientID='2', **MIA), 1, 0),
    (dict(PatientID='1', **MIA),
     dict(PatientName='MUSTER^MIA^^^', PatientBirthDate='20160229'), 1, 0),
    (dict(PatientID='1', **MIA),
     dict(PatientID='2', **MIA | dict(PatientBirthDate='20170101')), 2, 0),
    (dict(PatientID='1', **MIA), dict(PatientID='2', PatientName='Muster^Mia'), 2, 1),
    (dict(PatientID='712', IssuerOfPatientID='KSB', **MIA),
     dict(PatientID='712', PatientName='Roe^Ann', PatientBirthDate='19990101'), 2, 1),
    (dict(PatientID='712'), dict(PatientID='7120'), 2, 0),
    (dict(PatientID='71-2'), dict(PatientID='712'), 2, 0)])
def test_one_person_of_a_dicom_archive_is_one_patient(tmp_path, one, other, n, n_candidates):
    for k, tags in enumerate((one, other)):
        save(tmp_path/'in'/str(k), dicom_image(noise(k, 8, 8), StudyInstanceUID=f'1.2.{k}', **tags))
    result = import_dicom(tmp_path/'in', tmp_path/'out')
    assert result.labels.patient.nunique()==result.summary['n_groups']==n
    assert result.summary['n_unknown_patients']==0
    candidates = result.summary['possibly_one_patient']
    assert len(candidates)==n_candidates
    assert all(c.startswith('P0001 and P0002: the same n') for c in candidates)
    tables = [raw for name, raw in files_of(tmp_path/'out').items() if not name.endswith('.png')]
    for secret in (b'KSB', b'Muster', b'muster', b'20160229', b'person'):
        assert not [raw for raw in tables if secret in raw]

def test_spellings_of_a_patient_share_a_group(tmp_path):
    patients = ['P007', 'p7', 'P70', 'Unknown', '']
    for k in range(5): write_png(tmp_path/'in'/f'{k}.png', noise(k))
    rows = ['file,patient', *(f'{k}.png,{p}' for k, p in enumerate(patients))]
    (tmp_path/'in'/'t.csv').write_text('\n'.join(rows))
    result = import_folder(tmp_path/'in', tmp_path/'out')
    assert result.labels.patient.tolist()==['P007', 'p7', 'P70', 'unknown-3', 'unknown-4']
    assert result.labels.group.tolist()==['P007', 'P007', 'P70', '3', '4']
    candidates = result.summary['possibly_one_patient']
    assert candidates==['P007 and p7: spelled differently, kept in one set']
    import_folder(tmp_path/'in', tmp_path/'private', deidentify=True)
    assert 'p7' not in (tmp_path/'private'/'import.json').read_text()

def test_views_of_an_unknown_patient_share_a_group(tmp_path):
    names = ['P1_AP.png', 'P1_lat.png', 'P2-LAT-L.png', 'P2/frontal.png', 'P3_1.png', 'P3_2.png']
    for k, name in enumerate(names): write_png(tmp_path/'in'/name, noise(k, 40, 40, 255, np.uint8))
    result = import_folder(tmp_path/'in', tmp_path/'out')
    groups = dict(zip(result.labels.source, result.labels.group))
    assert groups['P1_AP.png']==groups['P1_lat.png']
    assert groups['P2-LAT-L.png']==groups['P2/frontal.png']
    assert len(set(groups.values()))==4                             # numbers may be patients
    assert result.summary['n_unknown_patients']==6 and result.summary['n_unknown_groups']==4
    text = format_summary(result, 'OUT')
    assert 'patient unknown: 6 images, in 4 groups' in text

# ---------------------------------------------------------------- YOLO sets as downloaded

@pytest.mark.parametrize('wanted, empty, expected', [
    ({'fluid': FLUID}, None, 'normal'), ({'fluid': ''}, None, 'normal'),
    ({'fluid': None}, None, ''), ({'fluid': None}, 'normal', 'normal'), ({'fluid': FLUID}, '', '')])
def test_empty_label_files_are_normal_if_no_class_is_left_out(tmp_path, wanted, empty, expected):
    labels = {'a': '0 .5 .5 .5 .5', 'b': '', 'c': ' \n'}
    source = write_yolo(tmp_path/'in', 'names: [fx, fluid]', labels)
    options = {} if empty is None else {'empty_label': empty}
    result = import_yolo(source, tmp_path/'out', CLASSES | wanted, **options)
    assert result.labels.pathology.tolist()==[FX, expected, expected]
    assert result.summary['n_empty_label_files']==2
    stated = f'2 images with an empty label file, imported as {expected or "unknown"}'
    assert stated in format_summary(result, 'OUT')

@pytest.mark.parametrize('name', ['data.yml', 'dataset.yaml', 'bones.yaml'])
def test_other_names_of_the_yolo_configuration(tmp_path, name):
    yaml = 'names: [fx]\nroboflow: {workspace: x, license: CC BY 4.0}\n'
    source = write_yolo(tmp_path/'in', yaml, {'a': '0 .5 .5 .5 .5'})
    (source/'data.yaml').rename(source/name)
    result = import_yolo(source, tmp_path/'out', CLASSES)
    assert result.labels.license.tolist()==['CC BY 4.0']
    assert import_yolo(source, tmp_path/'out', CLASSES, license='mine').labels.license[0]=='mine'
    (source/'data.yaml').write_text(yaml)
    if name=='bones.yaml': import_yolo(source, tmp_path/'out', CLASSES)
    else:
        with pytest.raises(ValueError, match='expected one of them'):
            import_yolo(source, tmp_path/'out', CLASSES)

def test_many_rejects_are_summarized(tmp_path):
    images = {f'{k:03d}': f'0 .5 .5 {k}' for k in range(60)} | {'z': '0 .5 .5 .5 .5'}
    source = write_yolo(tmp_path/'in', 'names: [fx]', images, (12, 12))
    (source/'labels'/'000.txt').write_text('5 .5 .5 .5 .5')
    result = import_yolo(source, tmp_path/'out', CLASSES)
    text = format_summary(result, 'OUT', deidentify=True)
    assert 'rejected: 59 x annotation, line 1: expected a class' in text
    assert 'all 60 are listed in OUT/rejects.csv' in text and len(text.splitlines())<30
    assert len(pd.read_csv(tmp_path/'out'/'rejects.csv'))==60

# ---------------------------------------------------------------- groups

def test_near_duplicates_are_linked_and_other_images_are_not():
    from elbowsynth.phantom.phantom import phantom
    images = []
    for k in range(20):
        pathology = 'normal' if k%3 else 'joint effusion'
        view, age = 'AP' if k%2 else 'LAT', 4+3*k
        images.append(phantom(view, [pathology], side='L', age=age, seed=100+k, size=192).image)
    def degraded(image):
        darker = (image*.85+15).astype(np.uint8)
        small = cv2.resize(darker, (140, 140), interpolation=cv2.INTER_AREA)
        jpeg = cv2.imencode('.jpg', small, [cv2.IMWRITE_JPEG_QUALITY, 60])[1]
        return cv2.imdecode(jpeg, 0)
    hashes = [difference_hash(i) for i in images]+[difference_hash(degraded(i)) for i in images]
    hashes = np.array(hashes)
    groups = near_duplicate_groups([str(k) for k in range(40)], hashes)
    assert groups==[str(k) for k in range(20)]*2
    deep = [difference_hash(i.astype(np.uint16)*257) for i in images]
    assert np.array_equal(deep, hashes[:20])

@settings(max_examples=50, deadline=None)
@given(st.lists(st.sampled_from('abcde'), min_size=1, max_size=12), st.integers(0, 99))
def test_groups_are_connected_components(stems, seed):
    n = len(stems)
    rng = np.random.default_rng(seed)
    hashes = rng.integers(0, 256, (3, 31), dtype=np.uint8)[rng.integers(0, 3, n)]
    groups = near_duplicate_groups(list(stems), hashes)
    def is_linked(i, j): return stems[i]==stems[j] or np.array_equal(hashes[i], hashes[j])
    reachable = np.array([[is_linked(i, j) for j in range(n)] for i in range(n)])
    for _ in stems: reachable = reachable@reachable
    assert all((groups[i]==groups[j])==reachable[i, j] for i in range(n) for j in range(n))

# ---------------------------------------------------------------- the command

def test_command(tmp_path, monkeypatch, capsys):
    import elbowsynth.data.import_cli as module
    mura, out = write_mura(tmp_path/'MURA-v1.1'), tmp_path/'out'
    command = [sys.executable, '-m', 'elbowsynth.data.import_cli']
    done = sh(*command, 'mura', mura, out, '--view', 'lateral', '--side', 'left')
    assert '3 images of 3 patients' in done.stdout
    assert 'still missing: pathology of 1' in done.stdout
    done = sh(*command, 'dicom', mura, tmp_path/'o', check=False)
    assert done.returncode==1 and '3 x not a DICOM file' in done.stderr
    assert 'Traceback' not in done.stderr

    def run(*words):
        monkeypatch.setattr(sys, 'argv', ['import_cli', *map(str, words)])
        module.main()
        return capsys.readouterr().out
    fill = tmp_path/'fill.csv'
    fill.write_text('file,pathology\npatient00000_study1_positive_image1.png,joint effusion\n')
    run('mura', mura, out, '--view', 'lateral', '--side', 'left', '--overrides', fill,
        '--license', 'mine')
    assert read_labels(out).pathology.tolist()==['joint effusion', 'normal', 'normal']

    two_windows = dicom_image(noise(1), WindowCenter=[9, 2048], WindowWidth=[9, 4096])
    save(tmp_path/'dicom'/'Zweifel', two_windows)
    (tmp_path/'dicom'/'Quincke').write_text('x')
    printed = run('dicom', tmp_path/'dicom', tmp_path/'from_dicom', '--voi-index', 1,
                  '--prefer-windows', '--pathology', 'normal')
    assert 'Quincke: not a DICOM file' in printed                   # printed, not written
    assert 'window 2048 4096' in (tmp_path/'from_dicom'/'labels.csv').read_text()

    table_folder = tmp_path/'plain'
    columns = ['--column', 'file=Bild', '--column', 'pathology=Befund']
    write_png(table_folder/'a.png', noise(2))
    (table_folder/'t.csv').write_text('bild;befund\na;Erguss\n')
    run('folder', table_folder, tmp_path/'from_plain', *columns, '--label', 'Erguss=joint effusion',
        '--deidentify')
    labels = pd.read_csv(tmp_path/'from_plain'/'labels.csv')
    assert labels.pathology.tolist()==['joint effusion']

    failing = tmp_path/'o2'
    for words, message in (
            (['mura', tmp_path/'nowhere', failing], 'expected the folder MURA-v1.1'),
            (['mura', mura, failing, '--voi-index', '1'], 'mura does not support --voi-index'),
            (['yolo', mura, failing], 'has no data.yaml'),
            (['mura', mura, failing, '--view', 'oblique'], 'unknown: --view oblique'),
            (['fracatlas', mura, failing], 'dataset.csv'),
            (['mura', mura, mura/'o2'], 'are nested'),
            (['folder', table_folder, failing, *columns], "1 labels without a mapping: 'Erguss'"),
            (['folder', mura, failing, '--overrides', tmp_path/'no.csv'], 'no.csv')):
        with pytest.raises(SystemExit) as stop: run(*words)
        assert message in str(stop.value) and not (failing/'labels.csv').exists()

def test_file_names_that_are_not_utf8(tmp_path):
    "Bytes that are not UTF-8 reach Python as surrogates, which no table can hold"
    good, bad = 'h\udce4kchen.png', 'kaputt\udce4.png'
    (tmp_path/'in').mkdir()
    def read(path):
        if path.name==bad: raise ValueError('it is empty')
        return noise(1), {}
    records = [{'file': good}, {'file': bad}]
    result = write_import(records, tmp_path/'in', tmp_path/'out', reader=read)
    assert result.labels.file.tolist()==['h_kchen.png']
    assert result.labels.source.tolist()==['h?kchen.png']
    assert 'kaputt?.png' in (tmp_path/'out'/'rejects.csv').read_text()
    if sys.platform=='linux':                                       # macOS has no such names
        (tmp_path/'in'/good).write_bytes(encode_png(noise(1)))
        assert list_files(tmp_path/'in')[0]==[good]

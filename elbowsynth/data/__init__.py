"Classes, images, labels, masks and the split; public names, each imported from its module when first used"
from elbowsynth.core import lazy_exports

PUBLIC = {                          # public name to module
    'PATHOLOGIES': 'classes', 'VIEWS': 'classes', 'SIDES': 'classes', 'region_of': 'classes',
    'caption': 'classes',
    'read_image': 'images', 'read_gray8': 'images', 'read_mask': 'images',
    'write_png': 'images', 'load_images': 'images', 'image_shape': 'images',
    'to_grayscale': 'images', 'thumbnail': 'images', 'binarize_mask': 'images',
    'LabelsError': 'labels', 'read_labels': 'labels', 'read_pairs': 'labels',
    'polygon_mask': 'annotations', 'mask_to_polygons': 'annotations',
    'hand_drawn_ellipse': 'annotations', 'read_shapes': 'annotations', 'merge_masks': 'annotations',
    'import_folder': 'importers',
    'is_dicom': 'dicom', 'read_dicom': 'dicom', 'import_dicom': 'dicom',
    'import_mura': 'public_datasets', 'import_fracatlas': 'public_datasets',
    'import_yolo': 'public_datasets', 'import_png16': 'public_datasets',
    'preprocess': 'preprocess', 'preprocess_folder': 'preprocess', 'clahe': 'preprocess',
    'fix_polarity': 'preprocess', 'remove_overlay': 'overlays', 'CropGeometry': 'preprocess',
    'heuristic_mask': 'masks', 'write_masks': 'masks', 'check_masks': 'masks',
    'plot_mask_checks': 'masks',
    'patient_groups': 'split', 'stratified_group_split': 'split', 'write_split': 'split'}
__all__ = lazy_exports(__name__, PUBLIC)

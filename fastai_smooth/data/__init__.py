"Data: embedded sets, one reader of users' files, label noise, and the network that fits a kind of data"
from .blocks import csv_dls, folder_dls, image_dls, lines_dls, mask_dls, pets_dls, table_csv_dls, texts_dls
from .embedded import (
    EMBEDDED, TABLES, digit_masks, digits, digits_arrays, docstrings, docstrings_arrays, embedded_table, mnist5k, mnist5k_arrays, multi_digits, table_arrays)
from .embedded import digit_masks_arrays, multi_digits_arrays # noqa: F401
from .files import SOURCES, ImageData, LabelledData, MaskData, TableData, TextData, read_source
from .images import downloading # noqa: F401
from .images import folder_files, open_image
from .label_issues import LabelIssues, find_label_issues
from .loaders import array_dls, stratified_split, table_dls, text_dls
from .loaders import ItemImage, batch_size_for, random_split, seeded # noqa: F401
from .masks import mask_files
from .networks import NETWORKS, build_model, build_unet, load_weights, network_for, small_convnet, small_segmenter, text_network
from .networks import body_of # noqa: F401
from .noise import corrupt_labels, transition_matrix
from .soft_labels import DawidSkene, SoftCategoryBlock, TensorSoftCategory, top_accuracy, top_class
from .soft_labels import SoftCategorize # noqa: F401
from .tables import read_table

__all__ = ['EMBEDDED', 'NETWORKS', 'SOURCES', 'TABLES', 'DawidSkene', 'ImageData', 'LabelIssues', 'LabelledData', 'MaskData', 'SoftCategoryBlock', 'TableData',
           'TensorSoftCategory', 'TextData', 'array_dls', 'build_model', 'build_unet', 'corrupt_labels', 'csv_dls', 'digit_masks', 'digits', 'digits_arrays',
           'docstrings', 'docstrings_arrays', 'embedded_table', 'find_label_issues', 'folder_dls', 'folder_files', 'image_dls', 'lines_dls', 'load_weights',
           'mask_dls', 'mask_files', 'mnist5k', 'mnist5k_arrays', 'multi_digits', 'network_for', 'open_image', 'pets_dls', 'read_source', 'read_table',
           'small_convnet', 'small_segmenter', 'stratified_split', 'table_arrays', 'table_csv_dls', 'table_dls', 'text_dls', 'text_network', 'texts_dls',
           'top_accuracy', 'top_class', 'transition_matrix']

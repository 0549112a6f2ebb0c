"Data: embedded sets, one reader of users' files, label noise, and the network that fits a kind of data"
from ._words import words, words_arrays
from .blocks import csv_dls, folder_dls, image_dls, lines_dls, mask_dls, pets_dls, table_csv_dls, texts_dls
from .embedded import (
    EMBEDDED, TABLES, digit_masks, digit_masks_arrays, digits, digits_arrays, docstrings, docstrings_arrays, embedded_table, mnist5k, mnist5k_arrays,
    multi_digits, multi_digits_arrays, table_arrays)
from .files import SOURCES, ImageData, LabelledData, MaskData, TableData, TextData, downloading, read_source
from .images import folder_files, open_image
from .loaders import array_dls, random_split, seeded, stratified_split, table_dls, text_dls
from .masks import mask_files
from .networks import NETWORKS, body_of, build_model, build_unet, load_weights, network_for, small_convnet, small_segmenter, text_network
from .noise import corrupt_labels, transition_matrix
from .tables import read_table

__all__ = ['EMBEDDED', 'NETWORKS', 'SOURCES', 'TABLES', 'ImageData', 'LabelledData', 'MaskData', 'TableData', 'TextData', 'array_dls', 'build_model',
           'build_unet', 'corrupt_labels', 'csv_dls', 'digit_masks', 'digits', 'digits_arrays', 'docstrings', 'docstrings_arrays', 'embedded_table',
           'folder_dls', 'folder_files', 'image_dls', 'lines_dls', 'load_weights', 'mask_dls', 'mask_files', 'mnist5k', 'mnist5k_arrays', 'multi_digits',
           'network_for', 'open_image', 'pets_dls', 'read_source', 'read_table', 'small_convnet', 'small_segmenter', 'stratified_split', 'table_arrays',
           'table_csv_dls', 'table_dls', 'text_dls', 'text_network', 'texts_dls', 'transition_matrix']

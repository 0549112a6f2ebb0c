"Folders and tables of real images, as people have them"
from pathlib import Path

from PIL import Image

from fastai_smooth.data import digits_arrays

# settings of `train finetune` that make it quick
QUICK = dict(arch='resnet10t', pretrained=False, size=32, presize=40, bs=16, epochs=1, freeze_epochs=0)
QUICK_ARGS = ['--arch', 'resnet10t', '--pretrained', 'no', '--size', '32', '--presize', '40', '--bs', '16', '--epochs', '1', '--freeze-epochs', '0']


def write_digits(root, n=200, split=False, nested=False, first=0):
    "Real digits as PNG files: 0, 1, ... or round/0, straight/1, ..., perhaps below train and valid"
    images, labels, _ = digits_arrays()
    for i in range(first, first+n):
        kind = 'round' if labels[i] in (0, 3, 6, 8, 9) else 'straight'
        folder = Path(root)/(('valid' if i % 4 == 0 else 'train') if split else '')/(f'{kind}/{labels[i]}' if nested else f'{labels[i]}')
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(images[i]).resize((16, 16)).save(folder/f'{i}.png')
    return labels[first:first+n]


def write_table(file, folder):
    "A CSV of the images below a folder and their classes, with file names from where the CSV is"
    rows = [f'{f.relative_to(file.parent).as_posix()},{f.parent.name}' for f in sorted(folder.rglob('*.png'))]
    file.write_text('\n'.join(['file,label', *rows]), encoding='utf-8')
    return file

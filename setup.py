"""Packaging: metadata, and configs and tools as ``pm_seg/.mim``.

What measures the package itself, ``tools/lab``, stays out.
"""

import re
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent


def requirements(name: str) -> list[str]:
    lines = (ROOT / 'requirements' / f'{name}.txt').read_text().splitlines()
    return [line for line in lines if line and not line.startswith('#')]


def version() -> str:
    text = (ROOT / 'pm_seg' / 'version.py').read_text()
    return re.search(r"'(.+)'", text).group(1)


class BuildWithConfigs(build_py):
    """Puts configs and tools where OpenMMLab tools look: package/.mim."""

    def run(self) -> None:
        super().run()
        if getattr(self, 'editable_mode', False):
            return
        target = Path(self.build_lib) / 'pm_seg' / '.mim'
        shutil.rmtree(target, ignore_errors=True)
        ignore = shutil.ignore_patterns(
            '__pycache__', 'lab', 'gpu_report.py', 'make_api_docs.py'
        )
        for folder in ('configs', 'tools'):
            shutil.copytree(ROOT / folder, target / folder, ignore=ignore)


setup(
    name='pm_seg',
    version=version(),
    description=(
        'Prune-and-Merge token compression of Vision Transformers for '
        'OpenMMLab segmentation and classification'
    ),
    long_description=(ROOT / 'README.md').read_text(),
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    python_requires='>=3.10',
    packages=find_packages(include=['pm_seg', 'pm_seg.*']),
    package_data={'pm_seg.visualization': ['*.jinja']},
    install_requires=requirements('runtime'),
    extras_require={
        'mm': requirements('mminstall'),
        'tests': requirements('tests'),
        'optional': requirements('optional'),
    },
    cmdclass={'build_py': BuildWithConfigs},
)

#!/usr/bin/env bash
# Installs ffcv 1.0.2 into a folder of its own, for comparisons, without root and without a change to the environment:
#
#     tools/install_ffcv.sh FOLDER [PYTHON]      then: PYTHONPATH=FOLDER PYTHON ...
#
# ffcv comes as source and asks pkg-config for all of OpenCV (690 MB with its dependencies), but uses only cv::resize and
# libjpeg-turbo. Debian's or Ubuntu's packages of the two, 10 MB, are unpacked into FOLDER/native, unless they are installed
# already; a .pc file and a header there replace the rest. PYTHON must have numpy, numba and torch.
set -euo pipefail
[ $# -ge 1 ] || { echo "usage: tools/install_ffcv.sh FOLDER [PYTHON]" >&2; exit 2; }
mkdir -p "$1"
folder=$(cd "$1" && pwd)
python=${2:-python3}
if [ -e "$folder/done" ]; then exit 0; fi
for needed in apt-get dpkg pkg-config g++; do
  command -v "$needed" > /dev/null || { echo "install_ffcv: $needed is missing: it builds on Debian and Ubuntu, with g++ and pkg-config" >&2; exit 1; }
done
native=$folder/native
mkdir -p "$native/lists/partial" "$native/cache/archives/partial" "$native/opencv2"
apt=(apt-get -qq -o Dir::State::Lists="$native/lists" -o Dir::Cache="$native/cache" -o APT::Sandbox::User="$(id -un)" -o Debug::NoLocking=1)

"${apt[@]}" update
# -s lists the packages that an installation would add.
missing=$("${apt[@]}" -s --no-install-recommends install libopencv-core-dev libopencv-imgproc-dev libturbojpeg0-dev |
  awk '/^Inst/ { print $2 }')
if [ -n "$missing" ]; then
  (cd "$native/cache" && "${apt[@]}" download $missing && for package in *.deb; do dpkg -x "$package" "$native"; done)
fi
rm -r "$native/lists" "$native/cache"

libraries=$native/usr/lib/$(g++ -print-multiarch)
printf '#include <opencv2/core.hpp>\n#include <opencv2/imgproc.hpp>\n' > "$native/opencv2/opencv.hpp"
cat > "$native/opencv4.pc" <<END
Name: opencv4
Description: the two parts of OpenCV that ffcv uses
Version: 4
Cflags: -I$native -I$native/usr/include/opencv4 -I/usr/include/opencv4
Libs: -lopencv_imgproc -lopencv_core
END
places=$libraries:$libraries/blas:$libraries/lapack
export PKG_CONFIG_PATH=$native:$libraries/pkgconfig CPATH=$native/usr/include LIBRARY_PATH=$libraries
export LDFLAGS="-Wl,--disable-new-dtags,-rpath,$places -Wl,-rpath-link,$places"  # also for the libraries' own needs
"$python" -m pip install --quiet --no-deps --no-cache-dir --upgrade --target "$folder" \
  ffcv==1.0.2 opencv-python-headless==5.0.0.93 tqdm==4.70.1 assertpy==1.1 terminaltables==3.1.10 psutil==7.2.2
PYTHONPATH=$folder "$python" -W ignore -c 'import ffcv.loader, ffcv.writer'
touch "$folder/done"

#!/usr/bin/env bash
# Builds the Python package: one wheel with libpegaflow.so, pegaflowd and pegactl, which runs on any
# Linux with glibc 2.28 or later, and the source distribution. The same commit gives the same bytes.
#
#   wheel.sh            builds both into python/dist
#   wheel.sh --native   builds library and programs only, into target/wheel/native
#   wheel.sh --pack     packs what is there
#   wheel.sh --tools    installs the tools only, which is all that needs a network beside cargo
#
# zig, from the Python package ziglang, links against the C library of GLIBC's version;
# cargo-zigbuild has cargo use it. Both, and all other tools, are installed under the target folder,
# in the versions of python/requirements-wheel.txt.
#   CARGO_TARGET_DIR, SOURCE_DATE_EPOCH [time of the last commit], PYTHON, OUT [python/dist]
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD

GLIBC=2.28
TRIPLE=x86_64-unknown-linux-gnu
PLATFORM=manylinux_${GLIBC//./_}_x86_64

target=${CARGO_TARGET_DIR:-$root/target}
work=$target/wheel
tools=$work/venv
out=${OUT:-$root/python/dist}
export SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct)}

if [[ ! -e $tools/ready || python/requirements-wheel.txt -nt $tools/ready ]]; then
    "${PYTHON:-python3}" -m venv "$tools"
    "$tools/bin/pip" install --quiet --disable-pip-version-check -r python/requirements-wheel.txt
    touch "$tools/ready"
fi
export PATH=$tools/bin:$PATH
export ZIG_GLOBAL_CACHE_DIR=$work/zig-cache ZIG_LOCAL_CACHE_DIR=$work/zig-cache
export CARGO_ZIGBUILD_CACHE_DIR=$work/zigbuild-cache

# No path of this machine in what is shipped.
cargo_home=${CARGO_HOME:-$HOME/.cargo}
export CARGO_ENCODED_RUSTFLAGS
CARGO_ENCODED_RUSTFLAGS=$(printf '%s\x1f%s' "--remap-path-prefix=$root=/pegaflow" \
    "--remap-path-prefix=$cargo_home=/cargo")
export CARGO_TARGET_DIR=$work CARGO_INCREMENTAL=0
# Names of functions stay, for backtraces.
export CARGO_PROFILE_RELEASE_DEBUG=false CARGO_PROFILE_RELEASE_STRIP=debuginfo

native() {
    local folder=$work/native triple=$TRIPLE.$GLIBC
    cargo-zigbuild zigbuild --release --locked --quiet --target "$triple" \
        -p pegaflow-engine -p pegaflow-tools --bin pegaflowd --bin pegactl
    cat >"$work/zig-cc" <<EOF
#!/bin/sh
exec "$tools/bin/python-zig" cc -target x86_64-linux-gnu.$GLIBC -Wl,--strip-debug "\$@"
EOF
    chmod 755 "$work/zig-cc"
    CARGO=cargo-zigbuild CC=$work/zig-cc DIST=$work/lib TRIPLE=$triple client-c/build-so.sh
    rm -rf "$folder"
    install -d "$folder"
    install -m 755 "$work/$TRIPLE/release/"{pegaflowd,pegactl} "$folder/"
    install -m 755 "$work/lib/lib/libpegaflow.so.0" "$folder/"
    install -m 644 packaging/THIRD-PARTY.md "$folder/"
    packaging/third-party.sh --texts "$folder/licenses"
    # zig's runtime for the compiler, and LLVM's unwinder in the place of libgcc_s.
    local zig
    zig=$(python -c 'import ziglang; print(ziglang.__path__[0])')
    install -m 644 "$zig/LICENSE" "$folder/licenses/zig-compiler_rt-LICENSE"
    install -m 644 "$zig/lib/libunwind/LICENSE.TXT" "$folder/licenses/llvm-libunwind-LICENSE"
    check "$folder"
}

contents() {
    python -m zipfile --list "$1" | awk 'NR > 1 && $1 !~ /\/$/ { print $1 }' | LC_ALL=C sort
}

# Nothing but the C library may be needed, and no version of it that is newer than promised.
check() {
    local file newest wanted
    local libc='^(libc|libm|libdl|libpthread|librt|libutil|ld-linux-x86-64)\.so\.[0-9]+$'
    for file in "$1"/{pegaflowd,pegactl,libpegaflow.so.0}; do
        wanted=$(readelf --dynamic --wide "$file" |
            sed -n 's/.*(NEEDED).*\[\(.*\)\]/\1/p' | grep -vE "$libc" || true)
        newest=$(readelf --version-info --wide "$file" |
            sed -n 's/.*Name: GLIBC_\([0-9.]*\).*/\1/p' | sort -uV | tail -n 1)
        if [[ -n $wanted ]]; then
            echo "wheel.sh: $file needs $wanted" >&2
            exit 1
        fi
        if [[ $(printf '%s\n' "$newest" "$GLIBC" | sort -V | tail -n 1) != "$GLIBC" ]]; then
            echo "wheel.sh: $file needs glibc $newest, newer than $GLIBC" >&2
            exit 1
        fi
        if grep -qaF -e "$root" -e "$cargo_home" "$file"; then
            echo "wheel.sh: $file contains a path of this machine" >&2
            exit 1
        fi
        echo "$(basename "$file"): glibc $newest or later"
    done
}

[[ ${1:-} == --tools ]] && exit 0
[[ ${1:-} == --pack ]] || native
[[ ${1:-} == --native ]] && exit 0

export PEGAFLOW_WHEEL_NATIVE=$work/native PEGAFLOW_WHEEL_PLATFORM=$PLATFORM
rm -rf "$out" "$work/repaired"
python -m build --no-isolation --wheel --sdist --outdir "$out" python
auditwheel show "$out"/*.whl
# What auditwheel would make of it is what it is: the same tag, nothing to be copied in.
auditwheel repair --plat "$PLATFORM" --wheel-dir "$work/repaired" "$out"/*.whl
cmp <(contents "$out"/*.whl) <(contents "$work"/repaired/*.whl)
[[ $(basename "$out"/*.whl) == $(basename "$work"/repaired/*.whl) ]]
(cd "$out" && sha256sum ./*)

#!/usr/bin/env bash
# Links libpegaflow.so with symbol versions and lays out what gets installed:
#
#   DIST/lib/libpegaflow.so.0.1.0, .so.0, .so; DIST/lib/libpegaflow.a
#   DIST/include/pegaflow.h; DIST/lib/pkgconfig/pegaflow.pc
#
# rustc hands the linker a version script of its own for a cdylib, and ld takes only one. So the
# shared library is linked from the static one.
#
# Usage: client-c/build-so.sh [--debug] [--install]
#   DIST       where to lay it out    [TARGET_DIR/dist]
#   PREFIX     in the .pc file; with --install also where it goes, below DESTDIR  [/usr/local]
#   TRIPLE     target of the compiler, such as x86_64-unknown-linux-gnu.2.28  [that of the machine]
#   CARGO, CC, CARGO_TARGET_DIR, STRIP=1
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
root=$(dirname "$here")
cargo=${CARGO:-cargo}
cc=${CC:-cc}
prefix=${PREFIX:-/usr/local}
profile=release
install=0
for argument in "$@"; do
    case $argument in
        --debug) profile=debug ;;
        --install) install=1 ;;
        *) echo "build-so.sh: unknown argument $argument" >&2; exit 2 ;;
    esac
done

cd "$root"
target=${CARGO_TARGET_DIR:-$root/target}
dist=${DIST:-$target/dist}
flags=()
[[ $profile == release ]] && flags+=(--release)
triple=${TRIPLE:-}
[[ -n $triple ]] && flags+=(--target "$triple")

# The note that cargo prints names the system libraries that the static library needs.
notes=$("$cargo" rustc "${flags[@]}" -p pegaflow-client --lib --crate-type staticlib \
    -- --print native-static-libs 2>&1) || { printf '%s\n' "$notes" >&2; exit 1; }
libs=$(printf '%s\n' "$notes" | sed -n 's/^note: native-static-libs: //p' | tail -n 1)
libs=${libs:--lgcc_s -lutil -lrt -lpthread -lm -ldl -lc}
version=$(sed -n '/^\[workspace.package\]/,/^\[/ s/^version = "\(.*\)"/\1/p' Cargo.toml)
soname=libpegaflow.so.${version%%.*}
# What follows the first dot is the version of the C library, for cargo-zigbuild.
archive=$target/${triple:+${triple%%.*}/}$profile/libpegaflow.a

rm -rf "$dist"
install -d "$dist/lib/pkgconfig" "$dist/include"
shared=$dist/lib/libpegaflow.so.$version
# shellcheck disable=SC2086 # the libraries are several words
"$cc" -shared -o "$shared" \
    -Wl,--whole-archive "$archive" -Wl,--no-whole-archive \
    -Wl,--version-script="$here/pegaflow.map" -Wl,-soname,"$soname" \
    -Wl,--gc-sections -Wl,--no-undefined -Wl,-z,relro,-z,now,-z,nodelete,-z,noexecstack \
    $libs
if [[ ${STRIP:-0} == 1 ]]; then
    strip --strip-unneeded "$shared"
fi
ln -s "libpegaflow.so.$version" "$dist/lib/$soname"
ln -s "$soname" "$dist/lib/libpegaflow.so"
install -m 644 "$archive" "$dist/lib/libpegaflow.a"
install -m 644 "$here/include/pegaflow.h" "$dist/include/"
sed -e "s|@PREFIX@|$prefix|" -e "s|@VERSION@|$version|" -e "s|@LIBS_PRIVATE@|$libs|" \
    "$here/pegaflow.pc.in" > "$dist/lib/pkgconfig/pegaflow.pc"

foreign=$(readelf --dyn-syms --wide "$shared" |
    awk '$7 != "UND" && $7 != "ABS" && $4 ~ /FUNC|OBJECT|IFUNC/ && $5 != "LOCAL" { print $8 }' |
    grep -v '^pega_[a-z_]*@@PEGAFLOW_0\.1$' || true)
if [[ -n $foreign ]]; then
    printf 'build-so.sh: exports that are not ours:\n%s\n' "$foreign" >&2
    exit 1
fi

if [[ $install == 1 ]]; then
    install -d "${DESTDIR:-}$prefix/lib/pkgconfig" "${DESTDIR:-}$prefix/include"
    cp -P "$dist"/lib/libpegaflow.* "${DESTDIR:-}$prefix/lib/"
    install -m 644 "$dist/lib/pkgconfig/pegaflow.pc" "${DESTDIR:-}$prefix/lib/pkgconfig/"
    install -m 644 "$dist/include/pegaflow.h" "${DESTDIR:-}$prefix/include/"
fi
echo "$dist"

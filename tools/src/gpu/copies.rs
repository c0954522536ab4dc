//! Copies in the shapes that a daemon could give them: many by one call, and by rows.

use std::ops::Range;
use std::ptr::null_mut;
use std::sync::OnceLock;

use cudarc::driver::sys;

use super::{DeviceMemory, GpuError, PinnedMemory, Stream, cu};

/// Which way bytes go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// From the GPU.
    ToHost,
    /// To the GPU.
    ToDevice,
}

/// Memory of a GPU and pinned memory of this process, between which bytes go that lie at the same
/// place of both.
#[derive(Debug)]
pub struct Pair {
    device: DeviceMemory,
    host: PinnedMemory,
}

/// Equally long rows at even distances.
#[derive(Clone, Copy, Debug)]
pub struct Rows {
    /// Where the first begins.
    pub offset: usize,
    /// Bytes of one.
    pub width: usize,
    /// Bytes from the begin of one to that of the next.
    pub pitch: usize,
    /// How many there are.
    pub count: usize,
}

/// Whether the driver takes many copies by one call (12.8 and later).
fn has_batches() -> bool {
    static HAS: OnceLock<bool> = OnceLock::new();
    // SAFETY: the library is loaded, since there is memory of a GPU; the symbol is only looked for.
    *HAS.get_or_init(|| unsafe {
        let symbol = sys::culib().get::<unsafe extern "C" fn()>(b"cuMemcpyBatchAsync\0");
        symbol.is_ok()
    })
}

impl Pair {
    /// Memories with these bytes.
    ///
    /// # Errors
    /// GPU or host have not as much.
    pub fn of(bytes: &[u8]) -> Result<Pair, GpuError> {
        let mut host = PinnedMemory::allocate(bytes.len())?;
        host.put(0, bytes);
        let device = DeviceMemory::allocate(bytes.len())?;
        device.write(0, bytes)?;
        Ok(Pair { device, host })
    }

    /// Bytes of each.
    pub fn bytes(&self) -> usize {
        self.device.bytes()
    }

    /// Copies pieces of the same length, one after the other from `range`'s first byte on, in the
    /// order of the stream: by one call where the driver has it, as the daemon does.
    ///
    /// # Errors
    /// The context is broken.
    ///
    /// # Panics
    /// The range does not lie inside, or is not a number of pieces.
    pub fn copy_pieces(
        &self,
        direction: Direction,
        range: Range<usize>,
        piece: usize,
        stream: &Stream,
    ) -> Result<(), GpuError> {
        assert!(range.len().is_multiple_of(piece), "whole pieces");
        let device = self.device.at(range.start, range.len());
        let host = self.host.at(range.start, range.len());
        let count = range.len() / piece;
        if has_batches() {
            let places = |base: u64| (0..count).map(|n| base + (n * piece) as u64).collect();
            let (mut devices, mut hosts): (Vec<u64>, Vec<u64>) =
                (places(device), places(host as u64));
            let (to, from) = match direction {
                Direction::ToHost => (&mut hosts, &mut devices),
                Direction::ToDevice => (&mut devices, &mut hosts),
            };
            let mut sizes = vec![piece; count];
            let anywhere = sys::CUmemLocation {
                type_: sys::CUmemLocationType::CU_MEM_LOCATION_TYPE_INVALID,
                id: 0,
            };
            let order = sys::CUmemcpySrcAccessOrder::CU_MEMCPY_SRC_ACCESS_ORDER_STREAM;
            let mut attributes = sys::CUmemcpyAttributes {
                srcAccessOrder: order,
                srcLocHint: anywhere,
                dstLocHint: anywhere,
                flags: sys::CUmemcpyFlags::CU_MEMCPY_FLAG_PREFER_OVERLAP_WITH_COMPUTE as u32,
            };
            let (mut first, mut failed) = (0, 0);
            // SAFETY: three lists of one length, and one set of attributes for all of it, which the
            // driver has read when the call returns; `at` has checked both ranges, and dropping
            // either memory waits for the GPU.
            return unsafe {
                cu!(cuMemcpyBatchAsync(
                    to.as_mut_ptr(),
                    from.as_mut_ptr(),
                    sizes.as_mut_ptr(),
                    count,
                    &mut attributes,
                    &mut first,
                    1,
                    &mut failed,
                    stream.raw()
                ))
            };
        }
        (range.start..range.end)
            .step_by(piece)
            .try_for_each(|at| match direction {
                Direction::ToHost => self.device.read_to(at, (&self.host, at), piece, stream),
                Direction::ToDevice => self.device.write_from(at, (&self.host, at), piece, stream),
            })
    }

    /// Copies rows by one call, in the order of the stream.
    ///
    /// # Errors
    /// The context is broken.
    ///
    /// # Panics
    /// They do not lie inside, or overlap.
    pub fn copy_rows(
        &self,
        direction: Direction,
        rows: Rows,
        stream: &Stream,
    ) -> Result<(), GpuError> {
        let Rows {
            offset,
            width,
            pitch,
            count,
        } = rows;
        assert!(count > 0 && width <= pitch, "rows that do not overlap");
        let bytes = (count - 1) * pitch + width;
        let (device, host) = (self.device.at(offset, bytes), self.host.at(offset, bytes));
        let on_host = sys::CUmemorytype::CU_MEMORYTYPE_HOST;
        let on_device = sys::CUmemorytype::CU_MEMORYTYPE_DEVICE;
        let (source, target) = match direction {
            Direction::ToHost => (on_device, on_host),
            Direction::ToDevice => (on_host, on_device),
        };
        // Of each side the place that goes with its kind of memory is read.
        let copy = sys::CUDA_MEMCPY2D {
            srcXInBytes: 0,
            srcY: 0,
            srcMemoryType: source,
            srcHost: host,
            srcDevice: device,
            srcArray: null_mut(),
            srcPitch: pitch,
            dstXInBytes: 0,
            dstY: 0,
            dstMemoryType: target,
            dstHost: host,
            dstDevice: device,
            dstArray: null_mut(),
            dstPitch: pitch,
            WidthInBytes: width,
            Height: count,
        };
        // SAFETY: from the first row to the end of the last one, `at` has checked both sides, and
        // dropping either memory waits for the GPU.
        unsafe { cu!(cuMemcpy2DAsync_v2(&copy, stream.raw())) }
    }
}

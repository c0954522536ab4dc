//! Matrix products, as the layers of a model compute them: what a bench lets the GPU do beside the
//! copies. cuBLAS is loaded when it is wanted.

use std::ptr::null_mut;

use cudarc::cublas::sys as blas;

use super::{DeviceMemory, GpuError, Stream};

/// cuBLAS on one stream.
pub struct Blas(blas::cublasHandle_t);

// SAFETY: a handle may be used by any thread, one at a time, which the exclusive borrow of
// `multiply` sees to.
unsafe impl Send for Blas {}

fn check(call: &'static str, status: blas::cublasStatus_t) -> Result<(), GpuError> {
    if status == blas::cublasStatus_t::CUBLAS_STATUS_SUCCESS {
        return Ok(());
    }
    let name = format!("{status:?}");
    Err(GpuError::Call { call, name })
}

/// Where a matrix of bf16 numbers begins.
#[derive(Clone, Copy, Debug)]
pub struct Matrix<'a> {
    /// Its memory.
    pub memory: &'a DeviceMemory,
    /// Its first byte in that.
    pub offset: usize,
}

impl Matrix<'_> {
    fn address(&self, rows: i32, columns: i32) -> u64 {
        let bytes = 2 * rows as usize * columns as usize;
        assert!(
            self.offset + bytes <= self.memory.bytes(),
            "inside the memory"
        );
        self.memory.address() + self.offset as u64
    }
}

impl Blas {
    /// On this stream, of the GPU that is the thread's.
    ///
    /// # Errors
    /// There is no cuBLAS, or it refuses.
    pub fn new(stream: &Stream) -> Result<Blas, GpuError> {
        // SAFETY: loads a library by its name.
        if !unsafe { blas::is_culib_present() } {
            return Err(GpuError::Library(
                "libcublas.so is not found: name its folder (such as /usr/local/cuda/lib64) in \
                 LD_LIBRARY_PATH, or leave out --interference"
                    .into(),
            ));
        }
        let mut handle = null_mut();
        // SAFETY: the place is writable; the stream lives longer than its use, which the caller's
        // synchronisation ends. Streams of driver and runtime are the same.
        unsafe {
            check("cublasCreate", blas::cublasCreate_v2(&mut handle))?;
            let made = Blas(handle);
            let result = blas::cublasSetStream_v2(handle, stream.raw().cast());
            check("cublasSetStream", result)?;
            Ok(made)
        }
    }

    /// `c = a * b` in bf16 with sums in f32; `a` is `m` x `k`, `b` is `k` x `n`, by columns.
    ///
    /// # Errors
    /// cuBLAS refuses.
    ///
    /// # Panics
    /// A matrix does not lie inside its memory.
    pub fn multiply(
        &mut self,
        (m, n, k): (i32, i32, i32),
        a: Matrix<'_>,
        b: Matrix<'_>,
        c: Matrix<'_>,
    ) -> Result<(), GpuError> {
        let (one, zero) = (1.0_f32, 0.0_f32);
        let bf16 = blas::cudaDataType_t::CUDA_R_16BF;
        let plain = blas::cublasOperation_t::CUBLAS_OP_N;
        // SAFETY: the three ranges were checked; the scalars are read before the call returns.
        let status = unsafe {
            blas::cublasGemmEx(
                self.0,
                plain,
                plain,
                m,
                n,
                k,
                (&raw const one).cast(),
                a.address(m, k) as *const _,
                bf16,
                m,
                b.address(k, n) as *const _,
                bf16,
                k,
                (&raw const zero).cast(),
                c.address(m, n) as *mut _,
                bf16,
                m,
                blas::cublasComputeType_t::CUBLAS_COMPUTE_32F,
                blas::cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT,
            )
        };
        check("cublasGemmEx", status)
    }
}

impl Drop for Blas {
    fn drop(&mut self) {
        // SAFETY: made by `new`, and nobody else has it.
        let _ = unsafe { blas::cublasDestroy_v2(self.0) };
    }
}

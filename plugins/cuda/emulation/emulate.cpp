// A GPU made up on the CPU: the CUDA runtime as far as src/launch.cu uses it, where a launch runs the kernel at once:
// thread blocks one after the other, the threads of one block as coroutines.
//
// With src/plan.cpp and src/launch.cu this makes a library with the C API of the real one, for pointers of the host.

#include <setjmp.h>
#include <ucontext.h>

#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>

#include "../src/plan.h"
#include "../src/tiles.h"
#include "cuda_runtime.h"

namespace lsp_cuda {

Kernels float16_kernels() { return kernels_of<Float16>(); }
Kernels bfloat16_kernels() { return kernels_of<BFloat16>(); }
Kernels int8_kernels() { return kernels_of<Int8>(); }

namespace {

struct Copy {
  uint32_t to;
  const void* from;
  int bytes;
};

// A thread. Only creating it costs a system call; switching is setjmp and longjmp.
struct Thread {
  enum State { READY, AT_BARRIER, WITH_WARP, DONE } state = READY;
  std::unique_ptr<char[]> stack{new char[STACK]};
  ucontext_t start;
  jmp_buf resume;
  bool started = false;
  Lane lane;
  std::vector<Copy> copies;               // not committed yet
  std::vector<std::vector<Copy>> groups;  // committed, the oldest first
  static constexpr size_t STACK = 64 << 10;
};

class Machine {
 public:
  Machine(void (*function)(Arguments), const Arguments& arguments, int grid, int threads, size_t shared_bytes,
          unsigned seed)
      : function_(function),
        arguments_(arguments),
        grid_(grid),
        thread_count_(threads),
        shared_(shared_bytes),
        random_(seed) {}

  void run() {
    for (block_ = 0; block_ < grid_; ++block_) run_block();
  }

  int thread() const { return running_; }
  int block() const { return block_; }
  int grid() const { return grid_; }

  uint8_t* shared(uint32_t address, int bytes) {
    if (address % bytes != 0 || address + bytes > shared_.size()) fail("shared memory: not aligned or outside");
    return shared_.data() + address;
  }

  void copy(const Copy& copy) {
    if (copy.bytes > 0 && reinterpret_cast<uintptr_t>(copy.from) % CHUNK_BYTES != 0) fail("cp.async: not aligned");
    std::memset(shared(copy.to, CHUNK_BYTES), 0x7f, CHUNK_BYTES);  // as floats and as integers it would be noticed
    threads_[running_].copies.push_back(copy);
  }
  void commit() {
    Thread& t = threads_[running_];
    t.groups.push_back(std::move(t.copies));
    t.copies.clear();
  }
  void wait(size_t pending) {
    auto& groups = threads_[running_].groups;
    while (groups.size() > pending) {
      for (const Copy& copy : groups.front()) {
        uint8_t* to = shared(copy.to, CHUNK_BYTES);
        std::memset(to, 0, CHUNK_BYTES);
        std::memcpy(to, copy.from, copy.bytes);
      }
      groups.erase(groups.begin());
    }
  }

  void suspend(Thread::State state) {
    Thread& t = threads_[running_];
    t.state = state;
    if (_setjmp(t.resume) == 0) _longjmp(scheduler_, 1);
  }
  void with_warp(const Lane& lane) {
    threads_[running_].lane = lane;
    suspend(Thread::WITH_WARP);
  }
  [[noreturn]] void fail(const char* error) {
    error_ = error;
    _longjmp(scheduler_, 1);
  }

 private:
  void run_block() {
    std::fill(shared_.begin(), shared_.end(), 0x7f);
    threads_.clear();
    threads_.resize(thread_count_);
    std::vector<int> warps(thread_count_ / 32);
    std::iota(warps.begin(), warps.end(), 0);
    while (threads_[0].state != Thread::DONE) {
      std::shuffle(warps.begin(), warps.end(), random_);
      for (int warp : warps) run_warp(warp * 32);
      for (Thread& t : threads_)  // all at the barrier, or all done
        if (t.state != threads_[0].state) throw std::runtime_error("some threads end, others wait at a barrier");
      if (threads_[0].state == Thread::AT_BARRIER)
        for (Thread& t : threads_) t.state = Thread::READY;
    }
  }

  // Until its threads are at a barrier or done.
  void run_warp(int first) {
    for (;;) {
      for (int i = first; i < first + 32; ++i) resume(i);
      const Thread::State state = threads_[first].state;
      for (int i = first; i < first + 32; ++i)
        if (threads_[i].state != state) throw std::runtime_error("the threads of a warp part ways");
      if (state != Thread::WITH_WARP) return;
      operate(&threads_[first]);
      for (int i = first; i < first + 32; ++i) threads_[i].state = Thread::READY;
    }
  }

  void resume(int number) {
    Thread& t = threads_[number];
    if (t.state != Thread::READY) return;
    running_ = number;
    if (_setjmp(scheduler_) == 0) {
      if (t.started) _longjmp(t.resume, 1);
      t.started = true;
      getcontext(&t.start);
      t.start.uc_stack.ss_sp = t.stack.get();
      t.start.uc_stack.ss_size = Thread::STACK;
      t.start.uc_link = nullptr;
      makecontext(&t.start, &Machine::enter, 0);
      setcontext(&t.start);
    }
    if (!error_.empty()) throw std::runtime_error(error_);
  }
  static void enter();

  void operate(Thread* lanes) {
    for (int i = 1; i < 32; ++i)
      if (lanes[i].lane.operation != lanes[0].lane.operation)
        throw std::runtime_error("the threads of a warp part ways");
    switch (lanes[0].lane.operation) {
      case Lane::LOAD_MATRICES:
        return load_matrices(lanes);
      case Lane::MULTIPLY_FLOAT16:
        return multiply<float, 2>(lanes, [](const uint8_t* e) { return widened(Float16(), bits(e)); });
      case Lane::MULTIPLY_BFLOAT16:
        return multiply<float, 2>(lanes, [](const uint8_t* e) { return widened(BFloat16(), bits(e)); });
      case Lane::MULTIPLY_INT8:
        return multiply<int32_t, 1>(lanes, [](const uint8_t* e) { return static_cast<int8_t>(*e); });
    }
  }
  static uint16_t bits(const uint8_t* e) { return static_cast<uint16_t>(e[0] | e[1] << 8); }

  // ldmatrix.x4: lane 8·m + r gives row r of matrix m, 16 bytes; lane l receives bytes 4·(l % 4)… of row l / 4 of each.
  void load_matrices(Thread* lanes) {
    for (int lane = 0; lane < 32; ++lane)
      for (int matrix = 0; matrix < 4; ++matrix)
        std::memcpy(static_cast<uint32_t*>(lanes[lane].lane.result) + matrix,
                    shared(lanes[matrix * 8 + lane / 4].lane.address, 16) + lane % 4 * 4, 4);
  }

  // mma.sync.m16n8: 32 bytes of K. A lane, with g = lane / 4 and q = lane % 4, holds of A rows g and g + 8 (registers
  // 0, 1) at bytes 4·q…, and the same 16 bytes later (2, 3); of B column g at bytes 4·q… and 16 bytes later; of C rows
  // g and g + 8, columns 2·q and 2·q + 1.
  template <class C, int BYTES, class Element>
  void multiply(Thread* lanes, Element element) {
    uint8_t a[16][32], b[8][32];
    for (int lane = 0; lane < 32; ++lane) {
      const int g = lane / 4, q = lane % 4;
      for (int i = 0; i < 4; ++i) std::memcpy(&a[g + i % 2 * 8][i / 2 * 16 + q * 4], &lanes[lane].lane.a[i], 4);
      for (int i = 0; i < 2; ++i) std::memcpy(&b[g][i * 16 + q * 4], &lanes[lane].lane.b[i], 4);
    }
    std::conditional_t<std::is_same_v<C, float>, double, int64_t> x[16][32], w[8][32];
    for (int k = 0; k < 32 / BYTES; ++k) {
      for (int row = 0; row < 16; ++row) x[row][k] = element(&a[row][k * BYTES]);
      for (int column = 0; column < 8; ++column) w[column][k] = element(&b[column][k * BYTES]);
    }
    for (int lane = 0; lane < 32; ++lane)
      for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
        C* sum = static_cast<C*>(lanes[lane].lane.result) + i;
        auto total = static_cast<std::remove_reference_t<decltype(x[0][0])>>(*sum);
        for (int k = 0; k < 32 / BYTES; ++k) total += x[row][k] * w[column][k];
        *sum = static_cast<C>(total);
      }
  }

  void (*function_)(Arguments);
  const Arguments& arguments_;
  const int grid_, thread_count_;
  int block_ = 0, running_ = 0;
  std::vector<uint8_t> shared_;
  std::mt19937 random_;
  std::vector<Thread> threads_;
  jmp_buf scheduler_;
  std::string error_;
};

thread_local Machine* machine;

void Machine::enter() {
  machine->function_(machine->arguments_);
  machine->suspend(Thread::DONE);
}

}  // namespace

int thread() { return machine->thread(); }
int block() { return machine->block(); }
int grid() { return machine->grid(); }
void barrier() { machine->suspend(Thread::AT_BARRIER); }
void with_warp(const Lane& lane) { machine->with_warp(lane); }
uint8_t* shared(uint32_t address, int bytes) { return machine->shared(address, bytes); }
void copy_async(uint32_t to, const void* from, int bytes) { machine->copy({to, from, bytes}); }
void copy_async_commit() { machine->commit(); }
void copy_async_wait(int pending) { machine->wait(pending); }

}  // namespace lsp_cuda

namespace {

struct Device {
  int number = 0, multiprocessors = 2, l2_bytes = 1 << 16;
  unsigned seed = 0;
};
Device device;
std::string launch_error;

}  // namespace

const char* cudaGetErrorString(cudaError_t) { return launch_error.c_str(); }
cudaError_t cudaGetDevice(int* number) {
  *number = device.number;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount ? device.multiprocessors : device.l2_bytes;
  return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void*, int, size_t) {
  *blocks = 1;
  return cudaSuccess;
}
cudaError_t cudaLaunchKernel(const void* function, dim3 grid, dim3 threads, void** arguments, size_t shared_bytes,
                             cudaStream_t) {
  using namespace lsp_cuda;
  const char* error = reported([&] {
    Machine emulated(reinterpret_cast<void (*)(Arguments)>(const_cast<void*>(function)),
                     *static_cast<const Arguments*>(arguments[0]), grid.x, threads.x, shared_bytes, device.seed);
    machine = &emulated;
    emulated.run();
  });
  if (error == nullptr) return cudaSuccess;
  launch_error = error;
  return cudaErrorLaunchFailure;
}

// From now on the device is another one; seed decides in which order warps run.
extern "C" void lsp_cuda_emulated_device(int multiprocessors, int l2_bytes, unsigned seed) {
  device = {device.number + 1, multiprocessors, l2_bytes, seed};
}

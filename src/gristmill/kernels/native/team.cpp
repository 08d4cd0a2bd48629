// Runs the kernels' loops on several threads.
//
// Training uses OpenMP, because its loops alternate with those of PyTorch's matrix products, which use OpenMP's threads. That is
// until a training notices that others take its cores (`yield_cores`).
//
// Inference uses a team of threads of its own. An OpenMP loop ends when every thread has arrived at its end. If a busy process shares
// the cores, one thread waits for its time slice while the others use up theirs by spinning, and a decoding step has hundreds
// of loops. A loop of the team ends when its pieces are done: a thread that is not running takes no piece, and the caller computes
// them all if it must. Idle threads spin as long as nobody takes their core away, and soon sleep if somebody does: sleeping makes room
// for the threads that have work, and waking up is quick on a core that is not idle.
#include <atomic>
#include <limits.h>
#include <linux/futex.h>
#include <omp.h>
#include <pthread.h>
#include <stdint.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

namespace {

typedef void (*Body)(const void* context, int64_t from, int64_t to);

const int MOST = 256;  // threads
const uint64_t CLOSED = 0xffffffffu;  // more pieces than any loop has
const int64_t US = 1000, MS = 1000 * US;  // in the clock's nanoseconds
const int64_t SPIN = 5 * MS;              // an idle thread spins so long before it sleeps,
const int64_t SPIN_DISTURBED = 50 * US;   // or so long while other processes take its core,
const int64_t INTERRUPTED = 1 * MS;       // which shows as a gap of this length in its spinning
const int64_t REMEMBER = 50 * MS, REMEMBER_MOST = 1600 * MS;  // and is assumed to last so long: longer each time that it comes back.

// `state` holds the number of the loop in the upper half and its next piece in the lower. A thread takes pieces by
// compare-and-swap, which fails if the caller has begun another loop since the thread read the fields below.
struct alignas(64) Loop {
    std::atomic<uint64_t> state{0};
    std::atomic<uint64_t> pieces{0}, few{1}, divisor{1};
    std::atomic<Body> body{nullptr};
    std::atomic<const void*> context{nullptr};
    alignas(64) std::atomic<uint64_t> done{0};
    alignas(64) std::atomic<int32_t> sequence{0};  // futex: raised when a loop begins
    std::atomic<bool> anybody_sleeps{false};
    alignas(64) std::atomic<int32_t> finished{0};  // futex: the caller sleeps here for the last piece
    std::atomic<bool> caller_sleeps{false};
    std::atomic<int> wanted{0};  // helpers that may take part
};

Loop loop;
std::atomic<bool> busy{false};  // one caller at a time; another one computes by itself
std::atomic<int64_t> disturbed_until{0}, disturbed_for{0};
std::atomic<bool> yields{false};  // others take the cores: no thread spins
thread_local int members = 0;  // threads of the team for the loops of this thread; 0: OpenMP's threads
int helpers = 0;
bool watching_forks = false;

inline void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#else
    __asm__ volatile("" : : : "memory");
#endif
}

inline int64_t now() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1'000'000'000ll + t.tv_nsec;
}

void futex_wait(std::atomic<int32_t>& word, int32_t value) { syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, value, nullptr, nullptr, 0); }
void futex_wake(std::atomic<int32_t>& word) { syscall(SYS_futex, &word, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0); }

void disturbed(int64_t t) {
    const int64_t last = disturbed_for.load(std::memory_order_relaxed), until = disturbed_until.load(std::memory_order_relaxed);
    const int64_t again = t - until < 2 * last ? 2 * last : REMEMBER, length = again < REMEMBER_MOST ? again : REMEMBER_MOST;
    disturbed_for.store(length, std::memory_order_relaxed);
    disturbed_until.store(t + length, std::memory_order_relaxed);
}

// Spins until done() or the time is over. Returns whether done().
template <class F> bool spin(F done) {
    for (int64_t began = 0, before = 0;;) {
        for (int i = 0; i < 64; i++) {
            if (done()) return true;
            pause();
        }
        const int64_t t = now();
        if (!began) began = before = t;
        if (t - before > INTERRUPTED) disturbed(t);
        before = t;
        if (t - began > (t < disturbed_until.load(std::memory_order_relaxed) ? SPIN_DISTURBED : SPIN)) return false;
    }
}

// How many of the remaining pieces a thread takes at once: many in the beginning, few at the end, where all should end together.
uint64_t run_of(uint64_t remaining) {
    const uint64_t share = remaining / loop.divisor.load(std::memory_order_acquire), few = loop.few.load(std::memory_order_acquire);
    const uint64_t run = share > few ? share : few;
    return run < remaining ? run : remaining;
}

// Takes pieces of the current loop until none is left.
void take_part() {
    uint64_t state = loop.state.load(std::memory_order_acquire);
    for (;;) {
        const uint64_t next = state & 0xffffffffu, pieces = loop.pieces.load(std::memory_order_acquire);
        if (next >= pieces) return;
        const Body body = loop.body.load(std::memory_order_acquire);
        const void* context = loop.context.load(std::memory_order_acquire);
        const uint64_t end = next + run_of(pieces - next);
        if (!loop.state.compare_exchange_weak(state, state + (end - next), std::memory_order_acq_rel)) continue;
        body(context, (int64_t)next, (int64_t)end);
        if (loop.done.fetch_add(end - next, std::memory_order_seq_cst) + (end - next) == pieces &&
            loop.caller_sleeps.load(std::memory_order_seq_cst)) {
            loop.finished.store(1, std::memory_order_seq_cst);
            futex_wake(loop.finished);
        }
        state = loop.state.load(std::memory_order_acquire);
    }
}

void* help(void* number) {
    int32_t seen = loop.sequence.load(std::memory_order_acquire);
    for (;;) {
        if ((intptr_t)number < loop.wanted.load(std::memory_order_relaxed)) take_part();
        const auto begun = [&] { return loop.sequence.load(std::memory_order_acquire) != seen; };
        if (!(yields.load(std::memory_order_relaxed) ? begun() : spin(begun))) {
            loop.anybody_sleeps.store(true, std::memory_order_seq_cst);
            while (!begun()) futex_wait(loop.sequence, seen);
        }
        seen = loop.sequence.load(std::memory_order_acquire);
    }
    return nullptr;
}

// A child process has the caller's thread only.
void forked() {
    helpers = 0;
    loop.anybody_sleeps = false;
    busy = false;
}

void hire(int count) {
    if (!watching_forks) watching_forks = pthread_atfork(nullptr, nullptr, forked) == 0;
    for (; helpers < count && helpers < MOST; helpers++) {
        pthread_t thread;
        if (pthread_create(&thread, nullptr, help, (void*)(intptr_t)helpers)) return;  // fewer do it
        pthread_detach(thread);
    }
}

}  // namespace

// ---- OpenMP's threads, too, sleep ------------------------------------------------------------------------

namespace {

pthread_mutex_t parking = PTHREAD_MUTEX_INITIALIZER;
pthread_cond_t unpark = PTHREAD_COND_INITIALIZER;
bool parked = false;

// libgomp's threads spin for 3 ms before they sleep, but hardly at all while it has more threads than CPUs (its manual, under
// GOMP_SPINCOUNT). This thread brings it a few more, which do nothing, until it is told to end.
void* park(void* threads) {
#pragma omp parallel num_threads((int)(intptr_t)threads)
    { __asm__ volatile("" : : : "memory"); }
    pthread_mutex_lock(&parking);
    while (parked) pthread_cond_wait(&unpark, &parking);
    pthread_mutex_unlock(&parking);
    return nullptr;
}

}  // namespace

// Whether threads that wait sleep at once, OpenMP's and the team's, and all kernels' loops run on the team.
extern "C" void yield_cores(bool on) {
    if (yields.exchange(on) == on) return;
    pthread_mutex_lock(&parking);
    parked = on;
    if (on) {
        const int more = omp_get_num_procs() - omp_get_max_threads() + 2;
        pthread_t thread;
        if (!pthread_create(&thread, nullptr, park, (void*)(intptr_t)(more > 2 ? more : 2))) pthread_detach(thread);
    } else {
        pthread_cond_signal(&unpark);
    }
    pthread_mutex_unlock(&parking);
}

// From now on the calling thread's loops run on a team of `threads`, or on OpenMP's threads if it is 0. Returns the number before.
extern "C" int set_team(int threads) {
    const int before = members;
    members = threads;
    return before;
}

// body(context, from, to) for consecutive pieces of 0 .. count - 1, of at least `few`, in any order and on several threads.
extern "C" void team_run(int64_t count, int64_t few, Body body, const void* context) {
    const int threads = members ? members : omp_get_max_threads();
    if (threads < 2 || count <= few) {
        body(context, 0, count);
        return;
    }
    if (!members && !yields.load(std::memory_order_relaxed)) {
        const int64_t pieces = (count + few - 1) / few;
#pragma omp parallel for schedule(guided)
        for (int64_t piece = 0; piece < pieces; piece++)
            body(context, piece * few, piece + 1 < pieces ? (piece + 1) * few : count);
        return;
    }
    if (count >= INT_MAX || busy.exchange(true, std::memory_order_acquire)) {
        body(context, 0, count);
        return;
    }
    hire(threads - 1);
    // Closed while the fields change, so that a thread that is late with the last loop cannot take a piece of a loop half described.
    const uint64_t number = ((loop.state.load(std::memory_order_relaxed) >> 32) + 1) << 32;
    loop.state.store(number | CLOSED, std::memory_order_seq_cst);
    loop.pieces.store((uint64_t)count, std::memory_order_release);
    loop.few.store((uint64_t)few, std::memory_order_release);
    loop.divisor.store((uint64_t)threads * 2, std::memory_order_release);
    loop.body.store(body, std::memory_order_release);
    loop.context.store(context, std::memory_order_release);
    loop.wanted.store(threads - 1, std::memory_order_release);
    loop.done.store(0, std::memory_order_release);
    loop.state.store(number, std::memory_order_release);
    loop.sequence.fetch_add(1, std::memory_order_seq_cst);
    if (loop.anybody_sleeps.load(std::memory_order_seq_cst)) {
        loop.anybody_sleeps.store(false, std::memory_order_seq_cst);
        futex_wake(loop.sequence);
    }
    take_part();
    const auto done = [&] { return loop.done.load(std::memory_order_seq_cst) == (uint64_t)count; };
    if (!spin(done)) {
        loop.finished.store(0, std::memory_order_seq_cst);
        loop.caller_sleeps.store(true, std::memory_order_seq_cst);
        while (!done()) futex_wait(loop.finished, 0);
        loop.caller_sleeps.store(false, std::memory_order_seq_cst);
    }
    busy.store(false, std::memory_order_release);
}

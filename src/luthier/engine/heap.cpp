// The heap that tensors lie in: the room of a freed tensor is whole again at once.
//
// Source: first fit in the order of addresses, neighbours merged at once (Knuth, The Art of Computer Programming,
// volume 1, section 2.5): what lies low is used again before anything above it is touched.
// torch asks glibc for aligned memory; glibc cuts what is too much from such a piece's ends and keeps it aside
// for small requests, so that a freed room no longer takes a tensor of the very size that left it.
//
// Small tensors stay with torch's own allocator. It does not know threads' caches, devices, or huge pages.

#include <c10/core/CPUAllocator.h>
#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstring>
#include <iterator>
#include <map>
#include <mutex>

namespace {

constexpr std::size_t LEAST = 16 * 1024;  // bytes of a tensor; smaller ones would cut rooms into pieces
constexpr std::size_t STEP = 64;          // bytes; rooms begin at multiples, as torch's tensors do

class Heap final : public c10::Allocator {
   public:
    Heap(char* first, std::size_t bytes) : first(first), last(first + bytes), rooms{{first, bytes}} {}

    c10::DataPtr allocate(std::size_t bytes) override {
        const bool large = bytes >= LEAST && bytes <= static_cast<std::size_t>(last - first);
        char* const place = large ? take((bytes + STEP - 1) / STEP * STEP) : nullptr;
        void* const data = place ? place : c10::GetDefaultCPUAllocator()->raw_allocate(bytes);
        return {data, data, &free, c10::Device(c10::DeviceType::CPU)};
    }

    c10::DeleterFnPtr raw_deleter() const override { return &free; }

    void copy_data(void* to, const void* from, std::size_t bytes) const override { std::memcpy(to, from, bytes); }

    // Whole pages that no tensor lies in go back to the kernel.
    void trim() {
        const std::lock_guard<std::mutex> alone(mutex);
        const auto page = static_cast<std::uintptr_t>(sysconf(_SC_PAGESIZE));
        for (const auto& [place, bytes] : rooms) {
            const auto low = (reinterpret_cast<std::uintptr_t>(place) + page - 1) / page * page;
            const auto high = reinterpret_cast<std::uintptr_t>(place + bytes) / page * page;
            if (low < high) madvise(reinterpret_cast<void*>(low), high - low, MADV_DONTNEED);
        }
    }

    std::mutex mutex;

   private:
    static void free(void* data);

    // The lowest room that is large enough, or null.
    char* take(std::size_t bytes) {
        const std::lock_guard<std::mutex> alone(mutex);
        for (auto room = rooms.begin(); room != rooms.end(); ++room) {
            const auto [place, size] = *room;
            if (size < bytes) continue;
            rooms.erase(room);
            if (size > bytes) rooms.emplace(place + bytes, size - bytes);
            taken.emplace(place, bytes);
            return place;
        }
        return nullptr;
    }

    // A room that is left grows by its free neighbours.
    void leave(char* place) {
        const std::lock_guard<std::mutex> alone(mutex);
        const auto found = taken.find(place);
        std::size_t bytes = found->second;
        taken.erase(found);
        const auto above = rooms.lower_bound(place);
        if (above != rooms.begin()) {
            const auto below = std::prev(above);
            if (below->first + below->second == place) {
                place = below->first;
                bytes += below->second;
                rooms.erase(below);
            }
        }
        if (above != rooms.end() && above->first == place + bytes) {
            bytes += above->second;
            rooms.erase(above);
        }
        rooms.emplace(place, bytes);
    }

    char* const first;
    char* const last;
    std::map<char*, std::size_t> taken, rooms;  // bytes of each; what is in no tensor is a room
};

Heap* heap = nullptr;  // never deleted: tensors outlive all else

void Heap::free(void* data) {
    char* const place = static_cast<char*>(data);
    if (place >= heap->first && place < heap->last) {
        heap->leave(place);
    } else {
        c10::GetDefaultCPUAllocator()->raw_deallocate(data);
    }
}

}  // namespace

extern "C" {

// From now on tensors lie in a heap of at most so many bytes of address space; false if those are not to be had.
bool hold(long bytes) {
    static std::mutex once;
    const std::lock_guard<std::mutex> alone(once);
    if (heap) return true;
    void* place = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (place == MAP_FAILED) return false;
    heap = new Heap(static_cast<char*>(place), bytes);
    // A child that is forked finds the heap whole and nobody at work in it.
    pthread_atfork([] { heap->mutex.lock(); }, [] { heap->mutex.unlock(); }, [] { heap->mutex.unlock(); });
    c10::SetCPUAllocator(heap, 1);
    return true;
}

void trim() {
    if (heap) heap->trim();
}

}  // extern "C"

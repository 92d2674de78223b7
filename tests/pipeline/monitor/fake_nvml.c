/* A libnvidia-ml.so.1 of ours: as much of NVML as the monitor calls, driven by a script.
 *
 *   gcc -shared -fPIC -Wl,-soname,libnvidia-ml.so.1 -o libnvidia-ml.so.1 fake_nvml.c     (-DOLD: a driver of 2016)
 *
 * The script comes from the environment variable FAKE_NVML and from fake_nvml(), commands separated by ';':
 *   gpus N                          how many GPUs there are (2 at first)
 *   set GPU KEY VALUE               what a reading says; the keys are those of defaults[]
 *   fail FUNCTION GPU AFTER CODE    from its AFTER-th call on, FUNCTION answers CODE for GPU (-1: every GPU)
 *   block FUNCTION GPU AFTER MS     that call lasts MS milliseconds
 *   xid GPU NUMBER                  raise an Xid event
 *   reset                           forget everything
 * FUNCTION * means every function that reads a GPU.
 */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define GPUS 16
#define RULES 64
#define LENGTH(array) (int)(sizeof(array) / sizeof((array)[0]))

typedef struct { int index; } *Device;
typedef struct { int gpu; } *EventSet;
typedef struct { const char *key; unsigned long long value; } Value;
typedef struct { char function[64]; int gpu, after, code, block_ms, calls; } Rule;

static const Value defaults[] = {
    {"utilization", 97},    {"memory_used", 40ULL << 30}, {"memory_total", 80ULL << 30}, {"power", 412500},
    {"energy", 1234567000}, {"temperature", 61},          {"sm_clock", 1980},            {"memory_clock", 2619},
    {"reasons", 4},         {"corrected", 3},             {"uncorrected", 0},            {"pending", 0},
    {"failed", 0},          {"recovery", 0},
};
static struct { int index; } devices[GPUS];
static unsigned long long values[GPUS][LENGTH(defaults)];
static int xids[GPUS][256], raised[GPUS], taken[GPUS], gpus;
static Rule rules[RULES];
static int rule_count;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static void reset(void)
{
    gpus = 2;
    rule_count = 0;
    for (int gpu = 0; gpu < GPUS; gpu++) {
        devices[gpu].index = gpu;
        raised[gpu] = taken[gpu] = 0;
        for (int key = 0; key < LENGTH(defaults); key++)
            values[gpu][key] = defaults[key].value;
    }
}

void fake_nvml(const char *script)
{
    char *copy = strdup(script), *rest = copy, *line, key[64];
    unsigned long long value;
    Rule rule;
    pthread_mutex_lock(&lock);
    while ((line = strsep(&rest, ";"))) {
        memset(&rule, 0, sizeof rule);
        if (strstr(line, "reset"))
            reset();
        else if (sscanf(line, " gpus %d", &gpus) == 1 || !*line)
            continue;
        else if (sscanf(line, " fail %63s %d %d %d", rule.function, &rule.gpu, &rule.after, &rule.code) == 4)
            rules[rule_count++ % RULES] = rule;
        else if (sscanf(line, " block %63s %d %d %d", rule.function, &rule.gpu, &rule.after, &rule.block_ms) == 4)
            rules[rule_count++ % RULES] = rule;
        else if (sscanf(line, " xid %d %d", &rule.gpu, &rule.code) == 2)
            xids[rule.gpu][raised[rule.gpu]++ % 256] = rule.code;
        else if (sscanf(line, " set %d %63s %llu", &rule.gpu, key, &value) == 3) {
            for (int i = 0; i < LENGTH(defaults); i++)
                if (!strcmp(defaults[i].key, key))
                    values[rule.gpu][i] = value;
        } else {
            fprintf(stderr, "fake_nvml: not understood: %s\n", line);
            abort();
        }
    }
    pthread_mutex_unlock(&lock);
    free(copy);
}

__attribute__((constructor)) static void begin(void)
{
    reset();
    if (getenv("FAKE_NVML"))
        fake_nvml(getenv("FAKE_NVML"));
}

/* What the script says of this call: block for a while, answer an error, or 0. */
static int gate(const char *function, int gpu)
{
    int code = 0, block_ms = 0;
    pthread_mutex_lock(&lock);
    for (int i = 0; i < rule_count && i < RULES; i++) {
        Rule *rule = &rules[i];
        int all = !strcmp(rule->function, "*") && !strncmp(function, "nvmlDeviceGet", 13) &&
                  !strstr(function, "Handle") && !strstr(function, "Count");
        if ((all || !strcmp(rule->function, function)) && (rule->gpu < 0 || rule->gpu == gpu) &&
            ++rule->calls > rule->after) {
            code = rule->code;
            block_ms += rule->block_ms;
        }
    }
    pthread_mutex_unlock(&lock);
    if (block_ms)
        usleep(block_ms * 1000);
    return code;
}

static unsigned long long look(Device gpu, const char *key)
{
    for (int i = 0; i < LENGTH(defaults); i++)
        if (!strcmp(defaults[i].key, key))
            return values[gpu->index][i];
    abort();
}

#define GATE(gpu) do { int code = gate(__func__, gpu); if (code) return code; } while (0)
#define READING(function, type, key) int function(Device gpu, type *out) \
    { GATE(gpu->index); *out = (type)look(gpu, key); return 0; }

int nvmlInitWithFlags(unsigned flags) { (void)flags; GATE(-1); return 0; }
int nvmlShutdown(void) { return 0; }
const char *nvmlErrorString(int code) { (void)code; return "an error of the fake"; }
int nvmlDeviceGetCount_v2(unsigned *out) { GATE(-1); *out = gpus; return 0; }

int nvmlDeviceGetHandleByIndex_v2(unsigned index, Device *out)
{
    GATE((int)index);
    if ((int)index >= gpus)
        return 2;
    *out = (Device)&devices[index];
    return 0;
}

int nvmlDeviceGetName(Device gpu, char *out, unsigned size)
{
    GATE(gpu->index);
    snprintf(out, size, "NVIDIA Fake 100");
    return 0;
}

int nvmlDeviceGetUUID(Device gpu, char *out, unsigned size)
{
    GATE(gpu->index);
    snprintf(out, size, "GPU-%08x-0000-4000-8000-000000000000", 0xabc0 + gpu->index);
    return 0;
}

int nvmlDeviceGetUtilizationRates(Device gpu, unsigned out[2])
{
    GATE(gpu->index);
    out[0] = (unsigned)look(gpu, "utilization");
    out[1] = 40;
    return 0;
}

int nvmlDeviceGetMemoryInfo(Device gpu, unsigned long long out[3])
{
    GATE(gpu->index);
    out[0] = look(gpu, "memory_total");
    out[2] = look(gpu, "memory_used");
    out[1] = out[0] - out[2];
    return 0;
}

READING(nvmlDeviceGetPowerUsage, unsigned, "power")
READING(nvmlDeviceGetCurrentClocksThrottleReasons, unsigned long long, "reasons")

int nvmlDeviceGetTemperature(Device gpu, int sensor, unsigned *out)
{
    GATE(gpu->index);
    *out = (unsigned)look(gpu, "temperature");
    return sensor;
}

int nvmlDeviceGetClockInfo(Device gpu, int type, unsigned *out)
{
    GATE(gpu->index);
    *out = (unsigned)look(gpu, type == 1 ? "sm_clock" : "memory_clock");
    return type == 1 || type == 2 ? 0 : 2;
}

int nvmlDeviceGetTotalEccErrors(Device gpu, int type, int counter, unsigned long long *out)
{
    GATE(gpu->index);
    *out = look(gpu, type == 0 ? "corrected" : "uncorrected");
    return counter ? 2 : 0;
}

#ifndef OLD
READING(nvmlDeviceGetTotalEnergyConsumption, unsigned long long, "energy")
READING(nvmlDeviceGetCurrentClocksEventReasons, unsigned long long, "reasons")

int nvmlDeviceGetRemappedRows(Device gpu, unsigned *corrected, unsigned *uncorrected, unsigned *pending,
                              unsigned *failed)
{
    GATE(gpu->index);
    *corrected = *uncorrected = 0;
    *pending = (unsigned)look(gpu, "pending");
    *failed = (unsigned)look(gpu, "failed");
    return 0;
}

typedef struct {
    unsigned id, scope;
    long long timestamp, latency;
    int type, code;
    union { unsigned number; unsigned long long wide; } value;
} FieldValue;

int nvmlDeviceGetFieldValues(Device gpu, int count, FieldValue *fields)
{
    GATE(gpu->index);
    for (int i = 0; i < count; i++) {
        fields[i].code = fields[i].id == 230 ? 0 : 2;
        fields[i].value.number = (unsigned)look(gpu, "recovery");
    }
    return 0;
}

static struct { int gpu; } sets[4096];
static int set_count;

int nvmlEventSetCreate(EventSet *out)
{
    GATE(-1);
    *out = (EventSet)&sets[__sync_fetch_and_add(&set_count, 1) % LENGTH(sets)];
    return 0;
}

int nvmlDeviceRegisterEvents(Device gpu, unsigned long long types, EventSet set)
{
    GATE(gpu->index);
    set->gpu = gpu->index;
    return types == 8 ? 0 : 3;
}

typedef struct {
    Device gpu;
    unsigned long long type, data;
    unsigned gpu_instance, compute_instance;
} EventData;

int nvmlEventSetWait_v2(EventSet set, EventData *out, unsigned timeout_ms)
{
    int gpu = set->gpu;
    GATE(gpu);
    if (taken[gpu] == raised[gpu]) {
        usleep(timeout_ms * 1000);
        return 10;
    }
    memset(out, 0, sizeof *out);
    out->gpu = (Device)&devices[gpu];
    out->type = 8;
    out->data = xids[gpu][taken[gpu]++ % 256];
    return 0;
}
#endif

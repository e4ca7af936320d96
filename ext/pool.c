/*
 * A bounded set of threads that wait for one piece of work at a time. The caller always works too, so a busy pool, a
 * failed thread start or a fork (which leaves the child without helpers) cost speed, never a result.
 */
#include "kimera.h"
#include <pthread.h>
#include <stdlib.h>
#include <unistd.h>

struct km_pool {
    pthread_mutex_t busy; /* held by the caller whose work runs */
    pthread_mutex_t lock; /* guards what follows */
    pthread_cond_t wake, done;
    pthread_t *threads;
    int helpers;
    pid_t owner;
    km_work work;
    void *context;
    uint64_t round;
    int wanted; /* helpers still to join this round */
    int next;   /* number of the next worker */
    int running;
    int stopping;
};

static void *helper(void *argument)
{
    km_pool *pool = argument;
    uint64_t seen = 0;
    pthread_mutex_lock(&pool->lock);
    for (;;) {
        while (!pool->stopping && (pool->round == seen || pool->wanted == 0)) {
            seen = pool->round;
            pthread_cond_wait(&pool->wake, &pool->lock);
        }
        if (pool->stopping)
            break;
        seen = pool->round;
        pool->wanted--;
        pool->running++;
        int worker = pool->next++;
        km_work work = pool->work;
        void *context = pool->context;
        pthread_mutex_unlock(&pool->lock);
        work(context, worker);
        pthread_mutex_lock(&pool->lock);
        if (--pool->running == 0)
            pthread_cond_signal(&pool->done);
    }
    pthread_mutex_unlock(&pool->lock);
    return NULL;
}

km_pool *km_pool_new(int threads)
{
    km_pool *pool = calloc(1, sizeof *pool);
    if (pool == NULL)
        return NULL;
    int wanted = threads > 1 ? threads - 1 : 0;
    pool->threads = calloc((size_t)(wanted > 0 ? wanted : 1), sizeof *pool->threads);
    if (pool->threads == NULL) {
        free(pool);
        return NULL;
    }
    pthread_mutex_init(&pool->busy, NULL);
    pthread_mutex_init(&pool->lock, NULL);
    pthread_cond_init(&pool->wake, NULL);
    pthread_cond_init(&pool->done, NULL);
    pool->owner = getpid();
    for (int i = 0; i < wanted; i++) {
        if (pthread_create(&pool->threads[i], NULL, helper, pool) != 0)
            break;
        pool->helpers++;
    }
    return pool;
}

void km_pool_free(km_pool *pool)
{
    if (pool == NULL)
        return;
    if (pool->owner == getpid()) {
        pthread_mutex_lock(&pool->lock);
        pool->stopping = 1;
        pthread_cond_broadcast(&pool->wake);
        pthread_mutex_unlock(&pool->lock);
        for (int i = 0; i < pool->helpers; i++)
            pthread_join(pool->threads[i], NULL);
        pthread_cond_destroy(&pool->wake);
        pthread_cond_destroy(&pool->done);
        pthread_mutex_destroy(&pool->lock);
        pthread_mutex_destroy(&pool->busy);
    }
    free(pool->threads);
    free(pool);
}

int km_pool_threads(const km_pool *pool) { return pool == NULL ? 1 : pool->helpers + 1; }

void km_pool_run(km_pool *pool, km_work work, void *context, int workers)
{
    if (pool == NULL || pool->helpers == 0 || workers <= 1 || pool->owner != getpid() ||
        pthread_mutex_trylock(&pool->busy) != 0) {
        work(context, 0);
        return;
    }
    pthread_mutex_lock(&pool->lock);
    pool->work = work;
    pool->context = context;
    pool->round++;
    pool->wanted = workers - 1 < pool->helpers ? workers - 1 : pool->helpers;
    pool->next = 1;
    pthread_cond_broadcast(&pool->wake);
    pthread_mutex_unlock(&pool->lock);

    work(context, 0);

    pthread_mutex_lock(&pool->lock);
    pool->wanted = 0; /* who has not woken yet is too late */
    while (pool->running > 0)
        pthread_cond_wait(&pool->done, &pool->lock);
    pthread_mutex_unlock(&pool->lock);
    pthread_mutex_unlock(&pool->busy);
}

"Second implementations to test against: loops in double precision, one number at a time"
import math

import numpy as np


def rows(q, axis):
    "A dense target or logits as a list of rows over the classes, positions in the order of the array"
    a = np.moveaxis(np.asarray(q, dtype=np.float64), axis, -1)
    return a.reshape(-1, a.shape[-1])


def encode(labels, n_classes, ignore=-100):
    "One-hot rows of a flat list of labels; an ignored label is a row of zeros"
    return [[0.]*n_classes if y == ignore else [1. if k == y else 0. for k in range(n_classes)] for y in labels]


def smooth_row(q, eps, convention='uniform', matrix=None):
    "One smoothed row; `eps` a number or one per class; `matrix` says where the mass of each class goes"
    n = len(q)
    e = [eps]*n if np.ndim(eps) == 0 else list(eps)
    if convention == 'classy': return [(q[k] + e[k]*0 + sum(e[j]*q[j] for j in range(n))/n)/(1+e[0]) for k in range(n)] if len(set(e)) == 1 else None
    out = []
    for k in range(n):
        got = 0.
        for j in range(n):
            if matrix is not None: share = matrix[j][k]
            elif convention == 'uniform': share = 1/n
            else: share = 0. if j == k else 1/(n-1)
            got += e[j]*q[j]*share
        out.append((1-e[k])*q[k] + got)
    return out


def log_softmax_row(z):
    top = max(z)
    norm = top + math.log(sum(math.exp(v-top) for v in z))
    return [v-norm for v in z]


def cross_entropy(logits, targets, eps=0., weight=None, weight_by='class', convention='uniform', matrix=None, reduction='mean'):
    "Smoothed cross entropy of rows of logits and rows of unsmoothed dense targets"
    losses, masses = [], []
    for z, q in zip(logits, targets):
        n = len(z)
        w = [1.]*n if weight is None else list(weight)
        log_p, smoothed = log_softmax_row(z), smooth_row(q, eps, convention, matrix)
        mass, weighted = sum(q), sum(w[k]*q[k] for k in range(n))
        if weight_by == 'class': loss = sum(-w[k]*smoothed[k]*log_p[k] for k in range(n) if smoothed[k])
        else: loss = sum(-smoothed[k]*log_p[k] for k in range(n) if smoothed[k])*(weighted/mass if mass else 0.)
        losses.append(loss), masses.append(weighted)
    if reduction == 'none': return losses
    if reduction == 'sum': return sum(losses)
    return sum(losses)/sum(masses) if sum(masses) else 0.


def binary_entry(y, eps, convention, n, eps_pos=None, eps_neg=None):
    "One smoothed binary entry"
    on, off = eps if eps_pos is None else eps_pos, eps if eps_neg is None else eps_neg
    share = {'half': .5, 'uniform': 1/n}.get(convention)
    if convention == 'complement': return y*(1-on) + (1-y)*off
    return y*(1-on+on*share) + (1-y)*off*share


def binary_cross_entropy(logits, targets, weight=None, pos_weight=None):
    "Mean over the entries that are not nan"
    total, known = 0., 0
    for z, row in zip(logits, targets):
        for k, (v, y) in enumerate(zip(z, row)):
            if math.isnan(y): continue
            log_p, log_not = -math.log1p(math.exp(-v)) if v > -30 else v, -math.log1p(math.exp(v)) if v < 30 else -v
            w, wp = 1. if weight is None else weight[k], 1. if pos_weight is None else pos_weight[k]
            total -= w*(wp*y*log_p + (1-y)*log_not)
            known += 1
    return total/known if known else 0.


def relaxation_row(z, y, alpha):
    "KL divergence of logits from the nearest distribution that gives the label at least 1-alpha"
    p = [math.exp(v) for v in log_softmax_row(z)]
    if p[y] >= 1-alpha: return 0.
    r = [1-alpha if k == y else alpha*p[k]/sum(p[j] for j in range(len(p)) if j != y) for k in range(len(p))]
    return sum(a*math.log(a/b) for a, b in zip(r, p) if a)
